// The loop: read any number of tokens into a pot of fixed size, and generate from it.

import { Graphs, type Values } from "./graphs";
import { allowed, byMass, counts } from "./keeping";
import { PotError, catalystOf, gathered, policyOf, type Manifest, type Policy } from "./manifest";
import { Pot, type Contents } from "./pot";
import { likeliest, surprise } from "./sampling";
import type { Text } from "./text";

export interface Stats {
  read: number; // tokens, those generated aside
  generated: number;
  compressions: number;
  resets: number;
  readSeconds: number; // prefill alone
  compressSeconds: number;
  generateSeconds: number; // decode
}

/** A session at one moment, without its settings. */
export interface State {
  pot: Contents;
  pending: number[];
  fed: number;
  novelty: number;
  last: Float32Array | null;
  toCome: number | null;
  tail: number[];
  stats: Stats;
}

const NOTHING: Stats = {
  read: 0, generated: 0, compressions: 0, resets: 0, readSeconds: 0, compressSeconds: 0, generateSeconds: 0,
};

export class Session {
  readonly pot: Pot;
  readonly policy: Policy;
  keep: number | "auto"; // slots that a compression keeps
  keepMass = 0.95; // of the attention, where `keep` is "auto"
  catalyst: number[];
  stats: Stats = { ...NOTHING };
  onCompress: (kept: Int32Array[], reset: boolean) => void = () => {};
  private pending: number[] = []; // not read yet: a chunk waits for the token after it
  private fed = 0; // so many of them, the last ones, were fed and not generated
  private novelty = 0; // of the first pending token
  private last: Float32Array | null = null; // logits that nothing has followed yet
  private toCome: number | null = null;
  private tail: number[] = []; // the last tokens read

  constructor(readonly manifest: Manifest, readonly graphs: Graphs, readonly text: Text, policy?: string) {
    this.policy = policyOf(manifest, policy);
    this.pot = new Pot(manifest);
    this.keep = manifest.pot.keep;
    this.catalyst = this.fitting(text.encode(this.general));
  }

  /** Forget everything that was read; the catalyst stays. */
  reset(): void {
    this.pot.forget();
    [this.pending, this.fed, this.novelty, this.last] = [[], 0, 0, null];
    [this.toCome, this.tail, this.stats] = [null, [], { ...NOTHING }];
  }

  /** What scores the pot where nothing else was said. */
  get general(): string {
    return catalystOf(this.manifest, this.policy);
  }

  /** Choose what the pot is scored by: an instruction, or the question if it is known. */
  setCatalyst(prompt: string): void {
    const ids = this.text.encode(prompt);
    if (!ids.length && this.policy.needs.includes("mass") && !this.policy.can_be_blind) {
      throw new PotError("the catalyst is empty; give the question, or a general instruction");
    }
    this.catalyst = this.fitting(ids);
  }

  /** Let all that was fed so far stay through every compression from now on; how many tokens that is. */
  pin(): number {
    const { pot, stats } = this;
    const count = Math.min(...pot.geometry.chosen.map((layer) => pot.filled(layer))) + this.pending.length;
    if (stats.read + this.fed + stats.generated > count) {
      throw new PotError("a compression has dropped some of what is to be pinned; pin it before the pot is full");
    }
    const { keep_max, recent } = this.manifest.pot;
    const most = this.keep === "auto" ? keep_max : Math.min(this.keep, keep_max);
    if (count > Math.max(0, most + pot.geometry.smallest - recent)) {
      throw new PotError(`${count} tokens are to be pinned, and a compression keeps ${most}`);
    }
    return (pot.pinned = count);
  }

  private fitting(ids: number[]): number[] {
    return ids.slice(Math.max(0, ids.length - this.manifest.pot.catalyst_width));
  }

  /**
   * Read any number of tokens; what is read does not depend on how they are cut into calls.
   * toCome: how many will follow, the answer included, if that is known.
   */
  async feed(ids: number[], toCome: number | null = null, onProgress = async (_waiting: number) => {}): Promise<void> {
    const outside = ids.find((id) => !(Number.isInteger(id) && id >= 0 && id < this.manifest.model.vocab_size));
    if (outside !== undefined) throw new PotError(`token ${outside} is outside the vocabulary`);
    this.append(ids);
    this.fed += ids.length;
    this.toCome = toCome;
    const { chunk } = this.manifest.pot;
    while (this.pending.length > chunk) {
      await this.read(chunk);
      await onProgress(this.pending.length);
    }
  }

  /** The likeliest tokens, until an end token or the limit; what was generated is part of what was read. */
  async *generate(limit: number): AsyncGenerator<number> {
    for (let step = 0; step < limit; step++) {
      const token = likeliest(await this.logits());
      this.accept(token);
      yield token;
      if (this.manifest.eos_token_ids.includes(token)) return;
    }
  }

  /** Read all that is pending; (V,) logits of the token after it. */
  async logits(): Promise<Float32Array> {
    if (!this.pending.length) throw new PotError("there is nothing to continue; feed at least one token first");
    if (this.pending.length > 1) await this.read(this.pending.length - 1);
    await this.makeRoom(1);
    const started = performance.now();
    const found = await this.graphs.run("decode", this.inputs("decode", this.pending.slice(0, 1)));
    this.store(found, 1, 1, Float32Array.of(this.novelty));
    this.last = found.logits as Float32Array;
    this.take(1);
    this.toCome = null;
    this.stats.generateSeconds += (performance.now() - started) / 1000;
    return this.last;
  }

  /** Take a token, drawn from the last logits, for the next one to read. */
  accept(token: number): void {
    if (this.last === null) throw new PotError("there are no logits to accept a token for; call logits first");
    this.append([token]);
    this.stats.generated += 1;
  }

  snapshot(): State {
    const { pending, fed, novelty, last, toCome, tail, stats } = this;
    return { pot: this.pot.save(), pending: [...pending], fed, novelty, last, toCome, tail, stats: { ...stats } };
  }

  restore(state: State): void {
    this.pot.load(state.pot);
    [this.pending, this.fed, this.novelty, this.last] = [[...state.pending], state.fed, state.novelty, state.last];
    [this.toCome, this.tail, this.stats] = [state.toCome, state.tail, { ...state.stats }];
  }

  private append(ids: number[]): void {
    if (ids.length && this.last !== null) {
      this.novelty = gathered(this.manifest, "novelty") ? surprise(this.last, ids[0]) : 0;
      this.last = null;
    }
    for (const id of ids) this.pending.push(id);
  }

  /** Put the first `count` pending tokens into the pot; one more is pending behind them. */
  private async read(count: number): Promise<void> {
    await this.makeRoom(count);
    const started = performance.now();
    const { chunk } = this.manifest.pot;
    const [ids, next] = [this.pending.slice(0, count), this.pending.slice(1, count + 1)];
    const found = await this.graphs.run("prefill", this.inputs("prefill", ids, next));
    const novelty = new Float32Array(count);
    novelty[0] = this.novelty;
    const ahead = (found.novelty ?? new Float32Array(count)) as Float32Array;
    novelty.set(ahead.subarray(0, count - 1), 1);
    this.novelty = ahead[count - 1];
    this.store(found, chunk, count, novelty);
    this.take(count);
    this.stats.readSeconds += (performance.now() - started) / 1000;
  }

  /** Put what a pass of `width` tokens gave behind the filled slots: the rows of the first `count`. */
  private store(found: Values, width: number, count: number, novelty: Float32Array): void {
    const { layers, chosen } = this.pot.geometry;
    const all = Array.from({ length: layers }, (_, layer) => layer);
    const of = (name: string, numbers: number[]) => perLayer<Float32Array>(found, name, numbers);
    if (this.pot.scores.received) this.pot.receive(of("mass", chosen), of("new_mass", chosen), width, count);
    this.pot.append(of("present.#.key", all), of("present.#.value", all), width, novelty, count);
  }

  private take(count: number): void {
    if (this.manifest.policies.some((policy) => policy.window)) {
      this.tail = [...this.tail, ...this.pending.slice(0, count)].slice(-this.manifest.pot.catalyst_width);
    }
    this.pending = this.pending.slice(count);
    const fed = Math.min(this.fed, this.pending.length);
    this.stats.read += this.fed - fed;
    this.fed = fed;
  }

  private async makeRoom(count: number): Promise<void> {
    if (count <= this.pot.room) return;
    const { slots } = this.manifest.pot;
    const least = this.toCome === null ? 0 : slots - this.pending.length - this.toCome;
    await this.compress(undefined, least);
  }

  /** Keep the best slots now; the loop does this by itself. */
  async compress(asked?: number, least = 0): Promise<void> {
    const { slots, keep_max, positions, recent } = this.manifest.pot;
    const range = allowed(this.manifest, this.pot);
    let keep = asked ?? (this.keep === "auto" ? null : Math.max(this.keep, Math.min(keep_max, least)));
    const check = (count: number) => {
      if (count >= range.least && count <= range.most) return;
      throw new PotError(`keep is ${count}; it must lie between ${range.least} and ${range.most}`);
    };
    if (keep !== null) check(keep); // before the work of observing
    const started = performance.now();
    await this.observeAll();
    if (keep === null) {
      const found = Math.max(byMass(this.manifest, this.pot, this.policy, this.keepMass), least);
      keep = Math.max(range.least, Math.min(range.most, found));
      check(keep); // fewer slots may be filled than must stay
    }
    const reset = this.pot.position + slots - keep + this.pot.geometry.widest > positions;
    await this.squeeze(keep, reset);
    if (recent < this.tail.length) this.tail = recent ? this.tail.slice(-recent) : [];
    this.stats.compressions += 1;
    this.stats.resets += Number(reset);
    this.stats.compressSeconds += (performance.now() - started) / 1000;
  }

  private async squeeze(keep: number, reset: boolean): Promise<void> {
    const { graph } = this.policy;
    const { chosen, windowed } = this.pot.geometry;
    const kept = counts(this.pot, keep);
    const after = Math.max(...chosen.map((layer) => this.pot.of(kept, layer)));
    const given = this.inputs(graph, []);
    given.keep = kept;
    given.reset = Int32Array.of(Number(reset));
    given.back = Int32Array.of(reset ? this.pot.position - after : 0);
    const found = await this.graphs.run(graph, given);
    const of = (name: string, layers: number[]) => perLayer<Float32Array>(found, name, layers);
    const slots = perLayer<Int32Array>(found, "kept", chosen);
    const [keys, last] = [of("present.#.key", chosen), of("present.#.key", windowed)];
    this.pot.replace(keys, of("present.#.value", chosen), slots, kept, reset, last);
    this.onCompress(slots, reset);
  }

  /** The passes that the policy wants before a compression. */
  private async observeAll(): Promise<void> {
    const { needs, window } = this.policy;
    if (needs.includes("mass")) {
      if (this.catalyst.length) await this.observe("mass", this.catalyst, 0);
      else this.pot.scores.mass.forEach((each) => each.fill(0));
    }
    if (needs.includes("window")) {
      const last = this.tail.slice(-window);
      await this.observe("window", last, last.length);
    }
  }

  /** Fill scores with the attention of `ids`; back: they are the last so many tokens, read again. */
  private async observe(into: string, ids: number[], back: number): Promise<void> {
    const found = await this.graphs.run("observe", this.inputs("observe", ids, [], back));
    const mass = perLayer<Float32Array>(found, "mass", this.pot.geometry.chosen);
    this.pot.scores[into].forEach((each, number) => each.set(mass[number]));
  }

  /** All inputs of a graph, by the contract's names. */
  private inputs(graph: string, ids: number[], next: number[] = [], back = 0): Values {
    const { pot } = this;
    const given: Values = {
      past_seq_len: pot.fills.map((fill) => Math.max(0, fill - back)),
      position: Int32Array.of(pot.position - back),
      pinned: Int32Array.of(pot.pinned),
    };
    const place = new Map(pot.geometry.chosen.map((layer, number) => [layer, number]));
    for (const { name, shape } of this.manifest.graphs[graph].inputs) {
      const [kind, layer, part] = name.split(".");
      const width = shape[shape.length - 1];
      if (name === "input_ids") given[name] = padded(ids, width);
      else if (name === "next_ids") given[name] = padded(next, width);
      else if (name === "query_weights") given[name] = Float32Array.from({ length: width }, (_, n) => Number(n < ids.length));
      else if (kind === "past_key_values") given[name] = (part === "key" ? pot.keys : pot.values)[Number(layer)];
      else if (kind === "positions") given[name] = pot.positions[place.get(Number(layer))!];
      else if (layer !== undefined && pot.scores[kind]) given[name] = pot.scores[kind][place.get(Number(layer))!];
    }
    return given;
  }
}

/** Outputs of these layers; # in the name is the layer, at the end where there is none. */
function perLayer<Kind>(found: Values, name: string, layers: number[]): Kind[] {
  const full = name.includes("#") ? name : `${name}.#`;
  return layers.map((layer) => found[full.replace("#", String(layer))] as Kind);
}

function padded(ids: number[], width: number): Int32Array {
  const filled = new Int32Array(width);
  filled.set(ids);
  return filled;
}

// src/manifest.ts
var FORMAT = 5;
var PotError = class extends Error {
};
function parse(text) {
  const manifest = JSON.parse(text);
  if (manifest.format !== FORMAT) {
    throw new PotError(`the bundle has format ${manifest.format}, and this page reads ${FORMAT}`);
  }
  const names = [...Object.keys(manifest.files), ...Object.values(manifest.graphs).map((graph) => graph.file)];
  const outside = [...names, manifest.weights].find((name) => /^$|^\.|[/\\]/.test(name));
  if (outside !== void 0) throw new PotError(`the bundle names the file ${outside}, which is not in its folder`);
  const specs = Object.values(manifest.graphs).flatMap((graph) => [...graph.inputs, ...graph.outputs]);
  const other = specs.find((spec) => spec.dtype !== "float32" && spec.dtype !== "int32");
  if (manifest.runtime !== "onnxruntime" || manifest.in_place || manifest.pot_dtype || other) {
    throw new PotError("the bundle is for another runtime; build it with: potexport build --target web");
  }
  return manifest;
}
function policyOf(manifest, label) {
  const found = label === void 0 ? manifest.policies[0] : manifest.policies.find((each) => each.label === label);
  if (found === void 0) throw new PotError(`the bundle has no policy ${label}`);
  return found;
}
function catalystOf(manifest, policy) {
  const shared = !manifest.policies.every((each) => each.can_be_blind);
  return policy.can_be_blind && shared ? "" : manifest.catalyst;
}
function gathered(manifest, what) {
  return manifest.policies.some((policy) => policy.needs.includes(what));
}
var Geometry = class {
  constructor(manifest) {
    this.manifest = manifest;
    const { pot, model } = manifest;
    const all = Array.from({ length: model.layers }, (_, layer) => layer);
    this.layers = model.layers;
    this.counts = pot.layer_slots.length || pot.windows.length ? model.layers : 1;
    this.chosen = all.filter((layer) => !this.window(layer));
    this.windowed = all.filter((layer) => this.window(layer));
    this.smallest = Math.min(0, ...all.map((layer) => this.more(layer)));
    this.widest = Math.max(pot.chunk, pot.catalyst_width);
  }
  manifest;
  layers;
  counts;
  // numbers that say how full the pot is: 1, or one a layer
  chosen;
  windowed;
  smallest;
  // what the smallest layer has more than `slots`: 0 or less
  widest;
  window(layer) {
    return this.manifest.pot.windows[layer] ?? 0;
  }
  /** Slots that a layer has, and keeps, more than the average; may be negative. */
  more(layer) {
    const { layer_slots, slots } = this.manifest.pot;
    return layer_slots.length ? layer_slots[layer] - slots : 0;
  }
  /** What a windowed layer keeps when it makes room. */
  windowKept(layer) {
    return this.window(layer) + this.manifest.pot.catalyst_width;
  }
  slots(layer) {
    const { slots, chunk } = this.manifest.pot;
    return this.window(layer) ? this.windowKept(layer) + chunk : slots + this.more(layer);
  }
  keepMax(layer) {
    return this.manifest.pot.keep_max + this.more(layer);
  }
};

// src/graphs.ts
var BUDGET = 3 * 2 ** 30;
var Graphs = class {
  constructor(manifest, ort, read2, providers = ["wasm"], budget = BUDGET) {
    this.manifest = manifest;
    this.ort = ort;
    this.read = read2;
    this.providers = providers;
    this.budget = budget;
    const weights = manifest.files[manifest.weights].size;
    if (weights > budget) {
      throw new PotError(
        `the weights take ${weights} bytes, and WebAssembly has room for ${budget}; use a smaller model`
      );
    }
  }
  manifest;
  ort;
  read;
  providers;
  budget;
  open = /* @__PURE__ */ new Map();
  // the last used comes last
  onOpen = () => {
  };
  /** Run a graph. given: all of its inputs, by name; of the outputs, all. */
  async run(name, given) {
    const { session } = await this.session(name);
    const spec = this.manifest.graphs[name];
    const feeds = {};
    for (const { name: input, dtype, shape } of spec.inputs) {
      const data = given[input];
      if (data === void 0) throw new Error(`nothing to give ${name} for ${input}`);
      feeds[input] = new this.ort.Tensor(dtype, data, shape);
    }
    const found = await session.run(feeds);
    return Object.fromEntries(spec.outputs.map((output) => [output.name, found[output.name].data]));
  }
  get names() {
    return [...this.open.keys()];
  }
  /** The session of a graph, opened if it is not; those used longest ago give way. */
  async session(name) {
    const known = this.open.get(name);
    if (known) {
      this.open.delete(name);
      this.open.set(name, known);
      return known;
    }
    const { weights, files, graphs } = this.manifest;
    const { file } = graphs[name];
    const bytes = name.startsWith("compress") ? 0 : files[weights].size;
    for (const [old, { session: session2, bytes: freed }] of this.open) {
      if (!freed || bytes + this.bytes <= this.budget) continue;
      this.open.delete(old);
      await session2.release();
    }
    this.onOpen(name);
    const session = await this.ort.InferenceSession.create(await this.read(file), {
      executionProviders: this.providers,
      externalData: [{ path: weights, data: await this.read(weights) }]
    });
    this.check(name, session);
    const opened = { session, bytes };
    this.open.set(name, opened);
    return opened;
  }
  get bytes() {
    return [...this.open.values()].reduce((sum, each) => sum + each.bytes, 0);
  }
  /** Refuse a file that does not declare what the manifest does. */
  check(name, session) {
    const spec = this.manifest.graphs[name];
    const told = (each) => `${each.name} ${each.dtype} ${each.shape.join()}`;
    const declared = [...session.inputMetadata, ...session.outputMetadata].map(
      (each) => each.isTensor ? `${each.name} ${each.type} ${each.shape.join()}` : each.name
    );
    const expected = [...spec.inputs, ...spec.outputs].map(told);
    const wrong = expected.filter((each) => !declared.includes(each));
    if (wrong.length || declared.length !== expected.length) {
      throw new PotError(`${spec.file} does not have ${wrong[0] ?? "the tensors"} that the manifest declares`);
    }
  }
  async close() {
    for (const { session } of this.open.values()) await session.release();
    this.open.clear();
  }
};

// src/keeping.ts
function allowed(manifest, pot) {
  const { sink, recent, keep_max } = manifest.pot;
  const { smallest } = pot.geometry;
  return { least: Math.max(sink, pot.pinned) + recent - smallest, most: Math.min(keep_max, pot.fill - smallest) };
}
function counts(pot, keep) {
  const { geometry, fills } = pot;
  if (geometry.counts === 1) return Int32Array.of(keep);
  return fills.map((fill, layer) => geometry.window(layer) ? fill : Math.min(fill, keep + geometry.more(layer)));
}
function byMass(manifest, pot, policy, share) {
  const name = ["mass", "window", "received"].find((each) => policy.needs.includes(each));
  if (name === void 0) throw new PotError("keep is auto, and the policy looks at no attention; give a number");
  const { slots, recent, keep } = manifest.pot;
  const first = Math.max(manifest.pot.sink, pot.pinned);
  const held = new Float64Array(slots + 1);
  let total = 0;
  pot.geometry.chosen.forEach((layer, number) => {
    const sums = heldBy(pot, pot.scores[name][number], layer, first, recent);
    for (let kept = 0; kept <= slots; kept++) {
      const at = Math.min(Math.max(kept + pot.geometry.more(layer), 0), sums.length - 1);
      held[kept] += sums[at];
    }
    total += sums[sums.length - 1];
  });
  if (total <= 0) return keep;
  const found = held.findIndex((each) => each >= share * total * (1 - 1e-9));
  return found < 0 ? slots + 1 : found;
}
function heldBy(pot, scores, layer, first, recent) {
  const [slots, fill] = [pot.geometry.slots(layer), pot.filled(layer)];
  const sums = new Float64Array(fill + 1);
  let stays = 0;
  for (let head = 0; head < pot.heads; head++) {
    const all = Float64Array.from(scores.subarray(head * slots, head * slots + fill));
    const free = all.slice(first, fill - recent).sort().reverse();
    const sum = (each) => each.reduce((a, b) => a + b, 0);
    stays += sum(all) - sum(free);
    let best = 0;
    free.forEach((each, number) => sums[first + recent + 1 + number] += best += each);
  }
  for (let kept = first + recent; kept <= fill; kept++) sums[kept] += stays;
  return sums;
}

// src/pot.ts
var CARRIED = ["novelty", "received"];
var SCORES = ["mass", "window", ...CARRIED];
function columns(to, toWidth, at, from, fromWidth, rows, count) {
  for (let row = 0; row < rows; row++) {
    to.set(from.subarray(row * fromWidth, row * fromWidth + count), row * toWidth + at);
  }
}
var Pot = class {
  geometry;
  heads;
  size;
  keys;
  // L x (1, Hkv, D, M)
  values;
  // L x (1, Hkv, M, D)
  // Of each layer that is compressed, (Hkv, M), by its place among these.
  positions;
  scores = {};
  born;
  // which token of all that were read a slot holds; for people, not for graphs
  sizes;
  // (1,) or (L,)
  fills;
  position = 0;
  // of the next token
  read = 0;
  // tokens, since the beginning
  pinned = 0;
  // so many of the first slots every compression keeps; some may not be filled as yet
  constructor(manifest) {
    const geometry = this.geometry = new Geometry(manifest);
    const { kv_heads: heads, head_size: size, layers } = manifest.model;
    [this.heads, this.size] = [heads, size];
    const rows = (layer) => new Float32Array(heads * size * geometry.slots(layer));
    this.keys = Array.from({ length: layers }, (_, layer) => rows(layer));
    this.values = Array.from({ length: layers }, (_, layer) => rows(layer));
    this.positions = geometry.chosen.map((layer) => new Int32Array(heads * geometry.slots(layer)));
    this.born = this.positions.map((each) => new Int32Array(each.length));
    for (const name of SCORES) {
      if (gathered(manifest, name)) this.scores[name] = this.positions.map((each) => new Float32Array(each.length));
    }
    this.sizes = Int32Array.from({ length: geometry.counts }, (_, layer) => geometry.slots(layer));
    this.fills = new Int32Array(geometry.counts);
    this.forget();
  }
  forget() {
    this.fills.fill(0);
    this.position = this.read = this.pinned = 0;
    for (const each of this.positions) each.fill(0);
  }
  /** A layer's, of one number for all layers or one for each. */
  of(counts2, layer) {
    return counts2[counts2.length > 1 ? layer : 0];
  }
  filled(layer) {
    return this.of(this.fills, layer);
  }
  /** Slots that hold a token, in the layer with the most. */
  get fill() {
    return Math.max(...this.geometry.chosen.map((layer) => this.filled(layer)));
  }
  /** How many more tokens every layer that is compressed can take. */
  get room() {
    return Math.min(...this.geometry.chosen.map((layer) => this.of(this.sizes, layer) - this.filled(layer)));
  }
  /** Put the first `count` new rows, of `width` that a pass gave, behind the filled slots. */
  append(keys, values, width, novelty, count) {
    for (const layer of this.geometry.windowed) this.dropOldest(layer, count);
    this.geometry.chosen.forEach((layer, number) => {
      const slots = this.geometry.slots(layer);
      for (let head = 0; head < this.heads; head++) {
        const first = head * slots + this.filled(layer);
        for (let n = 0; n < count; n++) {
          this.positions[number][first + n] = this.position + n;
          this.born[number][first + n] = this.read + n;
          if (this.scores.novelty) this.scores.novelty[number][first + n] = novelty[n];
        }
      }
    });
    for (let layer = 0; layer < this.geometry.layers; layer++) {
      const [slots, fill, size] = [this.geometry.slots(layer), this.filled(layer), this.size];
      columns(this.keys[layer], slots, fill, keys[layer], width, this.heads * size, count);
      columns(this.values[layer], slots * size, fill * size, values[layer], width * size, this.heads, count * size);
    }
    for (let n = 0; n < this.fills.length; n++) this.fills[n] += count;
    this.position += count;
    this.read += count;
  }
  /** Add the attention of the last `count` tokens of a pass of `width`, which are not appended yet. */
  receive(mass, newMass, width, count) {
    this.scores.received.forEach((received, number) => {
      const layer = this.geometry.chosen[number];
      const [slots, fill] = [this.geometry.slots(layer), this.filled(layer)];
      for (let head = 0; head < this.heads; head++) {
        const at = head * slots;
        for (let slot = 0; slot < fill; slot++) received[at + slot] += mass[number][at + slot];
        received.set(newMass[number].subarray(head * width, head * width + count), at + fill);
      }
    });
  }
  /**
   * Make the first `counts` rows of what a compression gave the whole of each layer that is compressed.
   * kept: (Hkv, K) of each. last: the keys of each windowed layer, (1, Hkv, D, M).
   */
  replace(keys, values, kept, counts2, reset, last) {
    const { chosen, windowed } = this.geometry;
    chosen.forEach((layer, number) => {
      const [slots, most, count] = [this.geometry.slots(layer), this.geometry.keepMax(layer), this.of(counts2, layer)];
      const size = this.size;
      columns(this.keys[layer], slots, 0, keys[number], most, this.heads * size, count);
      columns(this.values[layer], slots * size, 0, values[number], most * size, this.heads, count * size);
      const carried = CARRIED.filter((name) => this.scores[name]).map((name) => this.scores[name][number]);
      const perSlot = [this.positions[number], this.born[number], ...carried];
      for (let head = 0; head < this.heads; head++) {
        for (let slot = 0; slot < count; slot++) {
          const from = head * slots + kept[number][head * most + slot];
          for (const each of perSlot) each[head * slots + slot] = each[from];
          if (reset) this.positions[number][head * slots + slot] = slot;
        }
      }
    });
    this.fills.set(counts2);
    if (!reset) return;
    this.position = Math.max(...chosen.map((layer) => this.of(counts2, layer)));
    windowed.forEach((layer, number) => {
      const slots = this.geometry.slots(layer);
      columns(this.keys[layer], slots, 0, last[number], slots, this.heads * this.size, this.filled(layer));
    });
  }
  /** Let a windowed layer forget what no query will see, if `count` more do not fit. */
  dropOldest(layer, count) {
    const [slots, keep, fill] = [this.geometry.slots(layer), this.geometry.windowKept(layer), this.filled(layer)];
    if (fill + count <= slots) return;
    const old = fill - keep;
    for (let row = 0; row < this.heads * this.size; row++) {
      this.keys[layer].copyWithin(row * slots, row * slots + old, row * slots + fill);
    }
    for (let head = 0; head < this.heads; head++) {
      const at = head * slots;
      this.values[layer].copyWithin(at * this.size, (at + old) * this.size, (at + fill) * this.size);
    }
    this.fills[layer] = keep;
  }
  all() {
    return [...this.keys, ...this.values, ...this.positions, ...this.born, ...Object.values(this.scores).flat()];
  }
  save() {
    const arrays = this.all().map((each) => each.slice());
    return { fills: this.fills.slice(), position: this.position, read: this.read, pinned: this.pinned, arrays };
  }
  load(contents) {
    this.fills.set(contents.fills);
    [this.position, this.read, this.pinned] = [contents.position, contents.read, contents.pinned];
    this.all().forEach((each, number) => each.set(contents.arrays[number]));
  }
};

// src/sampling.ts
function likeliest(logits) {
  let best = 0;
  for (let id = 0; id < logits.length; id++) {
    if (Number.isNaN(logits[id])) throw new PotError("the graph produced NaN among its logits");
    if (logits[id] > logits[best]) best = id;
  }
  return best;
}
function surprise(logits, token) {
  const peak = logits[likeliest(logits)];
  let sum = 0;
  for (const logit of logits) sum += Math.exp(logit - peak);
  return Math.log(sum) - (logits[token] - peak);
}

// src/session.ts
var NOTHING = {
  read: 0,
  generated: 0,
  compressions: 0,
  resets: 0,
  readSeconds: 0,
  compressSeconds: 0,
  generateSeconds: 0
};
var Session = class {
  // the last tokens read
  constructor(manifest, graphs, text, policy) {
    this.manifest = manifest;
    this.graphs = graphs;
    this.text = text;
    this.policy = policyOf(manifest, policy);
    this.pot = new Pot(manifest);
    this.keep = manifest.pot.keep;
    this.catalyst = this.fitting(text.encode(this.general));
  }
  manifest;
  graphs;
  text;
  pot;
  policy;
  keep;
  // slots that a compression keeps
  keepMass = 0.95;
  // of the attention, where `keep` is "auto"
  catalyst;
  stats = { ...NOTHING };
  onCompress = () => {
  };
  pending = [];
  // not read yet: a chunk waits for the token after it
  fed = 0;
  // so many of them, the last ones, were fed and not generated
  novelty = 0;
  // of the first pending token
  last = null;
  // logits that nothing has followed yet
  toCome = null;
  tail = [];
  /** Forget everything that was read; the catalyst stays. */
  reset() {
    this.pot.forget();
    [this.pending, this.fed, this.novelty, this.last] = [[], 0, 0, null];
    [this.toCome, this.tail, this.stats] = [null, [], { ...NOTHING }];
  }
  /** What scores the pot where nothing else was said. */
  get general() {
    return catalystOf(this.manifest, this.policy);
  }
  /** Choose what the pot is scored by: an instruction, or the question if it is known. */
  setCatalyst(prompt) {
    const ids = this.text.encode(prompt);
    if (!ids.length && this.policy.needs.includes("mass") && !this.policy.can_be_blind) {
      throw new PotError("the catalyst is empty; give the question, or a general instruction");
    }
    this.catalyst = this.fitting(ids);
  }
  /** Let all that was fed so far stay through every compression from now on; how many tokens that is. */
  pin() {
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
    return pot.pinned = count;
  }
  fitting(ids) {
    return ids.slice(Math.max(0, ids.length - this.manifest.pot.catalyst_width));
  }
  /**
   * Read any number of tokens; what is read does not depend on how they are cut into calls.
   * toCome: how many will follow, the answer included, if that is known.
   */
  async feed(ids, toCome = null, onProgress = async (_waiting) => {
  }) {
    const outside = ids.find((id) => !(Number.isInteger(id) && id >= 0 && id < this.manifest.model.vocab_size));
    if (outside !== void 0) throw new PotError(`token ${outside} is outside the vocabulary`);
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
  async *generate(limit) {
    for (let step = 0; step < limit; step++) {
      const token = likeliest(await this.logits());
      this.accept(token);
      yield token;
      if (this.manifest.eos_token_ids.includes(token)) return;
    }
  }
  /** Read all that is pending; (V,) logits of the token after it. */
  async logits() {
    if (!this.pending.length) throw new PotError("there is nothing to continue; feed at least one token first");
    if (this.pending.length > 1) await this.read(this.pending.length - 1);
    await this.makeRoom(1);
    const started = performance.now();
    const found = await this.graphs.run("decode", this.inputs("decode", this.pending.slice(0, 1)));
    this.store(found, 1, 1, Float32Array.of(this.novelty));
    this.last = found.logits;
    this.take(1);
    this.toCome = null;
    this.stats.generateSeconds += (performance.now() - started) / 1e3;
    return this.last;
  }
  /** Take a token, drawn from the last logits, for the next one to read. */
  accept(token) {
    if (this.last === null) throw new PotError("there are no logits to accept a token for; call logits first");
    this.append([token]);
    this.stats.generated += 1;
  }
  snapshot() {
    const { pending, fed, novelty, last, toCome, tail, stats } = this;
    return { pot: this.pot.save(), pending: [...pending], fed, novelty, last, toCome, tail, stats: { ...stats } };
  }
  restore(state) {
    this.pot.load(state.pot);
    [this.pending, this.fed, this.novelty, this.last] = [[...state.pending], state.fed, state.novelty, state.last];
    [this.toCome, this.tail, this.stats] = [state.toCome, state.tail, { ...state.stats }];
  }
  append(ids) {
    if (ids.length && this.last !== null) {
      this.novelty = gathered(this.manifest, "novelty") ? surprise(this.last, ids[0]) : 0;
      this.last = null;
    }
    for (const id of ids) this.pending.push(id);
  }
  /** Put the first `count` pending tokens into the pot; one more is pending behind them. */
  async read(count) {
    await this.makeRoom(count);
    const started = performance.now();
    const { chunk } = this.manifest.pot;
    const [ids, next] = [this.pending.slice(0, count), this.pending.slice(1, count + 1)];
    const found = await this.graphs.run("prefill", this.inputs("prefill", ids, next));
    const novelty = new Float32Array(count);
    novelty[0] = this.novelty;
    const ahead = found.novelty ?? new Float32Array(count);
    novelty.set(ahead.subarray(0, count - 1), 1);
    this.novelty = ahead[count - 1];
    this.store(found, chunk, count, novelty);
    this.take(count);
    this.stats.readSeconds += (performance.now() - started) / 1e3;
  }
  /** Put what a pass of `width` tokens gave behind the filled slots: the rows of the first `count`. */
  store(found, width, count, novelty) {
    const { layers, chosen } = this.pot.geometry;
    const all = Array.from({ length: layers }, (_, layer) => layer);
    const of = (name, numbers) => perLayer(found, name, numbers);
    if (this.pot.scores.received) this.pot.receive(of("mass", chosen), of("new_mass", chosen), width, count);
    this.pot.append(of("present.#.key", all), of("present.#.value", all), width, novelty, count);
  }
  take(count) {
    if (this.manifest.policies.some((policy) => policy.window)) {
      this.tail = [...this.tail, ...this.pending.slice(0, count)].slice(-this.manifest.pot.catalyst_width);
    }
    this.pending = this.pending.slice(count);
    const fed = Math.min(this.fed, this.pending.length);
    this.stats.read += this.fed - fed;
    this.fed = fed;
  }
  async makeRoom(count) {
    if (count <= this.pot.room) return;
    const { slots } = this.manifest.pot;
    const least = this.toCome === null ? 0 : slots - this.pending.length - this.toCome;
    await this.compress(void 0, least);
  }
  /** Keep the best slots now; the loop does this by itself. */
  async compress(asked, least = 0) {
    const { slots, keep_max, positions, recent } = this.manifest.pot;
    const range = allowed(this.manifest, this.pot);
    let keep = asked ?? (this.keep === "auto" ? null : Math.max(this.keep, Math.min(keep_max, least)));
    const check = (count) => {
      if (count >= range.least && count <= range.most) return;
      throw new PotError(`keep is ${count}; it must lie between ${range.least} and ${range.most}`);
    };
    if (keep !== null) check(keep);
    const started = performance.now();
    await this.observeAll();
    if (keep === null) {
      const found = Math.max(byMass(this.manifest, this.pot, this.policy, this.keepMass), least);
      keep = Math.max(range.least, Math.min(range.most, found));
      check(keep);
    }
    const reset = this.pot.position + slots - keep + this.pot.geometry.widest > positions;
    await this.squeeze(keep, reset);
    if (recent < this.tail.length) this.tail = recent ? this.tail.slice(-recent) : [];
    this.stats.compressions += 1;
    this.stats.resets += Number(reset);
    this.stats.compressSeconds += (performance.now() - started) / 1e3;
  }
  async squeeze(keep, reset) {
    const { graph } = this.policy;
    const { chosen, windowed } = this.pot.geometry;
    const kept = counts(this.pot, keep);
    const after = Math.max(...chosen.map((layer) => this.pot.of(kept, layer)));
    const given = this.inputs(graph, []);
    given.keep = kept;
    given.reset = Int32Array.of(Number(reset));
    given.back = Int32Array.of(reset ? this.pot.position - after : 0);
    const found = await this.graphs.run(graph, given);
    const of = (name, layers) => perLayer(found, name, layers);
    const slots = perLayer(found, "kept", chosen);
    const [keys, last] = [of("present.#.key", chosen), of("present.#.key", windowed)];
    this.pot.replace(keys, of("present.#.value", chosen), slots, kept, reset, last);
    this.onCompress(slots, reset);
  }
  /** The passes that the policy wants before a compression. */
  async observeAll() {
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
  async observe(into, ids, back) {
    const found = await this.graphs.run("observe", this.inputs("observe", ids, [], back));
    const mass = perLayer(found, "mass", this.pot.geometry.chosen);
    this.pot.scores[into].forEach((each, number) => each.set(mass[number]));
  }
  /** All inputs of a graph, by the contract's names. */
  inputs(graph, ids, next = [], back = 0) {
    const { pot } = this;
    const given = {
      past_seq_len: pot.fills.map((fill) => Math.max(0, fill - back)),
      position: Int32Array.of(pot.position - back),
      pinned: Int32Array.of(pot.pinned)
    };
    const place = new Map(pot.geometry.chosen.map((layer, number) => [layer, number]));
    for (const { name, shape } of this.manifest.graphs[graph].inputs) {
      const [kind, layer, part] = name.split(".");
      const width = shape[shape.length - 1];
      if (name === "input_ids") given[name] = padded(ids, width);
      else if (name === "next_ids") given[name] = padded(next, width);
      else if (name === "query_weights") given[name] = Float32Array.from({ length: width }, (_, n) => Number(n < ids.length));
      else if (kind === "past_key_values") given[name] = (part === "key" ? pot.keys : pot.values)[Number(layer)];
      else if (kind === "positions") given[name] = pot.positions[place.get(Number(layer))];
      else if (layer !== void 0 && pot.scores[kind]) given[name] = pot.scores[kind][place.get(Number(layer))];
    }
    return given;
  }
};
function perLayer(found, name, layers) {
  const full = name.includes("#") ? name : `${name}.#`;
  return layers.map((layer) => found[full.replace("#", String(layer))]);
}
function padded(ids, width) {
  const filled = new Int32Array(width);
  filled.set(ids);
  return filled;
}

// src/text.ts
import { Template } from "./vendor.js";
import { Tokenizer } from "./vendor.js";
var HELD = 32;
var Text = class {
  trusted;
  literal;
  // reads special tokens as letters
  controls;
  // their names
  specialIds;
  specials = {};
  template;
  /** Of the files of the same names; config and template may be missing. */
  constructor(tokenizer, config, template) {
    const document = JSON.parse(tokenizer);
    document.truncation = document.padding = null;
    const settings = { clean_up_tokenization_spaces: false };
    this.trusted = new Tokenizer(document, settings);
    const added = document.added_tokens;
    this.specialIds = new Set(added.filter((each) => each.special).map((each) => each.id));
    const told = config === null ? {} : JSON.parse(config);
    for (const [name, value] of Object.entries(told)) {
      const token = value?.content ?? value;
      if (name.endsWith("_token") && typeof token === "string") this.specials[name] = token;
    }
    const named = new Set(Object.values(this.specials));
    const control = (each) => each.special || named.has(each.content);
    this.controls = added.filter(control).map((each) => each.content);
    const others = added.filter((each) => !control(each));
    this.literal = new Tokenizer({ ...document, added_tokens: others }, settings);
    const source = template ?? oldTemplate(told);
    this.template = source === null ? null : new Template(source);
  }
  get hasTemplate() {
    return this.template !== null;
  }
  /** Ids of a text; trusted: special tokens written in it count as such. Nothing is added. */
  encode(text, trusted = true) {
    if (!text) return [];
    return (trusted ? this.trusted : this.literal).encode(text, { add_special_tokens: false }).ids;
  }
  /** The text of ids, without special tokens. */
  decode(ids) {
    const known = ids.filter((id) => this.hasText(id));
    return known.length ? this.trusted.decode(known, { clean_up_tokenization_spaces: false }) : "";
  }
  hasText(id) {
    return this.trusted.id_to_token(id) !== void 0 && !this.specialIds.has(id);
  }
  stream() {
    return new Stream(this);
  }
  /** What stands before and after a document in a chat; only a placeholder is rendered. */
  frame(after) {
    if (this.template === null) throw new PotError("the model has no chat template");
    const name = this.controls.find((each) => after.includes(each));
    if (name !== void 0) {
      throw new PotError(`the question contains ${name}, which is a control token of the model; ask without it`);
    }
    const mark = `pOtDocument${crypto.randomUUID().replaceAll("-", "")}`;
    const messages = [{ role: "user", content: mark + after }];
    const given = { tools: null, documents: null, add_generation_prompt: true, ...this.specials, messages };
    const parts = this.template.render(given).split(mark);
    if (parts.length !== 2) throw new PotError("the chat template does not give back what a user says");
    return [parts[0], parts[1]];
  }
  /** What a text without a chat template begins with. */
  beginning() {
    const id = this.trusted.token_to_id(this.specials.bos_token ?? "");
    const first = this.trusted.encode("", { add_special_tokens: true }).ids[0];
    return id !== void 0 && first === id ? [id] : [];
  }
};
var Stream = class {
  constructor(text) {
    this.text = text;
  }
  text;
  printed = [];
  pending = [];
  /** The text that a token completes, maybe none. */
  push(token) {
    if (!this.text.hasText(token)) return "";
    this.pending.push(token);
    const fresh = this.fresh();
    if ((!fresh || fresh.endsWith("�")) && this.pending.length < HELD) return "";
    [this.printed, this.pending] = [this.pending, []];
    return fresh;
  }
  /** What is still held back. */
  flush() {
    const fresh = this.pending.length ? this.fresh() : "";
    [this.printed, this.pending] = [[...this.printed, ...this.pending].slice(-HELD), []];
    return fresh;
  }
  fresh() {
    const old = this.text.decode(this.printed);
    const both = this.text.decode([...this.printed, ...this.pending]);
    return both.startsWith(old) ? both.slice(old.length) : this.text.decode(this.pending);
  }
};
function oldTemplate(config) {
  const found = config.chat_template;
  if (Array.isArray(found)) return found.find((each) => each?.name === "default")?.template ?? null;
  return typeof found === "string" ? found : null;
}

// src/reading.ts
var PIECE = 1 << 16;
var AROUND = 1 << 10;
var [TRIES, STEPS] = [4, 8];
var CUTS = [/(?<=\n)(?=\S)/g, /(?=\n\S)/g, /(?= \S)/g];
function frame(text, question) {
  const after = question ? `

${question}` : "";
  if (!text.hasTemplate) return { head: text.beginning(), tail: text.encode(after), trusted: true };
  const [head, tail] = text.frame(after);
  return { head: text.encode(head), tail: text.encode(tail), trusted: false };
}
async function* blocks(bytes) {
  const decoder = new TextDecoder("utf-8", { fatal: true });
  let held = "";
  const decode = (part) => {
    try {
      return part ? decoder.decode(part, { stream: true }) : decoder.decode();
    } catch {
      throw new PotError("the file is not UTF-8 text; convert it, for example with iconv -t UTF-8");
    }
  };
  for await (const part of bytes) {
    held += decode(part);
    const last = held.endsWith("\r") ? 1 : 0;
    held = lines(held.slice(0, held.length - last)) + held.slice(held.length - last);
    while (held.length - last > PIECE) {
      const high = /[\ud800-\udbff]/.test(held[PIECE - 1]) ? 1 : 0;
      yield held.slice(0, PIECE - high);
      held = held.slice(PIECE - high);
    }
  }
  held = lines(held + decode());
  if (held) yield held;
}
function lines(text) {
  return text.replace(/\r\n?/g, "\n");
}
async function* pieces(text, given, trusted) {
  let [held, searched] = ["", 0];
  for await (const block of given) {
    held += block;
    if (held.length < Math.max(2 * AROUND, 2 * searched)) continue;
    const at = cut(text, held, searched, trusted);
    searched = held.length;
    if (at) {
      yield text.encode(held.slice(0, at), trusted);
      [held, searched] = [held.slice(at), 0];
    }
  }
  if (held) yield text.encode(held, trusted);
}
function cut(text, held, searched, trusted) {
  const last = held.length - AROUND;
  const earliest = Math.max(searched, last - STEPS * AROUND, AROUND) - AROUND;
  for (let first = last - AROUND; first >= earliest; first -= AROUND) {
    for (const kind of CUTS) {
      kind.lastIndex = first;
      for (let tried = 0; tried < TRIES; tried++) {
        const found = kind.exec(held);
        if (found === null || found.index > first + AROUND) break;
        if (found.index && joins(text, held, found.index, trusted)) return found.index;
        kind.lastIndex = found.index + 1;
      }
    }
  }
  return 0;
}
function joins(text, held, at, trusted) {
  const [left, right] = [held.slice(Math.max(at - AROUND, 0), at), held.slice(at, at + AROUND)];
  const parts = [...text.encode(left, trusted), ...text.encode(right, trusted)];
  const both = text.encode(left + right, trusted);
  return both.length === parts.length && both.every((id, number) => id === parts[number]);
}
async function read(session, document, around, { answer, onProgress, onText, share = () => 1 }) {
  const waiting = [around.head];
  let [ahead, found, done] = [around.head.length, 0, 0];
  const feed = async (toCome) => {
    const ids = waiting.shift();
    done += ids.length;
    const total = (around.head.length + found) / share();
    await session.feed(ids, toCome, async (left) => onProgress?.(done - left, total));
  };
  for await (const ids of pieces(session.text, document, around.trusted)) {
    waiting.push(ids);
    [ahead, found] = [ahead + ids.length, found + ids.length];
    while (ahead - waiting[0].length > session.manifest.pot.slots) {
      ahead -= waiting[0].length;
      await feed(ahead);
    }
  }
  if (!found) throw new PotError("the file is empty; give at least one character of text to read");
  waiting.push(around.tail);
  ahead += around.tail.length;
  while (waiting.length) {
    ahead -= waiting[0].length;
    if (waiting.length === 1) onText?.();
    await feed(ahead + answer);
  }
}

// src/runtime.ts
async function open(ort, read2, options = {}) {
  const decoder = new TextDecoder("utf-8", { fatal: true });
  const manifest = parse(decoder.decode(await read2("potexport.json")));
  const optional = async (file) => file in manifest.files ? decoder.decode(await read2(file)) : null;
  const [tokenizer, config, template] = [
    decoder.decode(await read2("tokenizer.json")),
    await optional("tokenizer_config.json"),
    await optional("chat_template.jinja")
  ];
  const graphs = new Graphs(manifest, ort, read2, options.providers, options.budget);
  return new Session(manifest, graphs, new Text(tokenizer, config, template), options.policy);
}
export {
  Graphs,
  PotError,
  Session,
  Stream,
  Text,
  blocks,
  frame,
  open,
  pieces,
  read
};

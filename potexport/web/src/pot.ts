// The pot: the key/value cache of fixed size, and what is known of each of its slots.

import { Geometry, gathered, type Manifest } from "./manifest";

const CARRIED = ["novelty", "received"]; // move with their slots
const SCORES = ["mass", "window", ...CARRIED];

/** A copy of what a pot holds. */
export interface Contents {
  fills: Int32Array;
  position: number;
  read: number;
  pinned: number;
  arrays: (Float32Array | Int32Array)[];
}

/** Copy `count` columns: of `rows` rows of `fromWidth` into rows of `toWidth`, from column `at` on. */
function columns(
  to: Float32Array, toWidth: number, at: number, from: Float32Array, fromWidth: number, rows: number, count: number,
): void {
  for (let row = 0; row < rows; row++) {
    to.set(from.subarray(row * fromWidth, row * fromWidth + count), row * toWidth + at);
  }
}

export class Pot {
  readonly geometry: Geometry;
  readonly heads: number;
  readonly size: number;
  readonly keys: Float32Array[]; // L x (1, Hkv, D, M)
  readonly values: Float32Array[]; // L x (1, Hkv, M, D)
  // Of each layer that is compressed, (Hkv, M), by its place among these.
  readonly positions: Int32Array[];
  readonly scores: Record<string, Float32Array[]> = {};
  readonly born: Int32Array[]; // which token of all that were read a slot holds; for people, not for graphs
  readonly sizes: Int32Array; // (1,) or (L,)
  readonly fills: Int32Array;
  position = 0; // of the next token
  read = 0; // tokens, since the beginning
  pinned = 0; // so many of the first slots every compression keeps; some may not be filled as yet

  constructor(manifest: Manifest) {
    const geometry = (this.geometry = new Geometry(manifest));
    const { kv_heads: heads, head_size: size, layers } = manifest.model;
    [this.heads, this.size] = [heads, size];
    const rows = (layer: number) => new Float32Array(heads * size * geometry.slots(layer));
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

  forget(): void {
    this.fills.fill(0);
    this.position = this.read = this.pinned = 0;
    for (const each of this.positions) each.fill(0);
  }

  /** A layer's, of one number for all layers or one for each. */
  of(counts: Int32Array, layer: number): number {
    return counts[counts.length > 1 ? layer : 0];
  }

  filled(layer: number): number {
    return this.of(this.fills, layer);
  }

  /** Slots that hold a token, in the layer with the most. */
  get fill(): number {
    return Math.max(...this.geometry.chosen.map((layer) => this.filled(layer)));
  }

  /** How many more tokens every layer that is compressed can take. */
  get room(): number {
    return Math.min(...this.geometry.chosen.map((layer) => this.of(this.sizes, layer) - this.filled(layer)));
  }

  /** Put the first `count` new rows, of `width` that a pass gave, behind the filled slots. */
  append(keys: Float32Array[], values: Float32Array[], width: number, novelty: Float32Array, count: number): void {
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
  receive(mass: Float32Array[], newMass: Float32Array[], width: number, count: number): void {
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
  replace(
    keys: Float32Array[], values: Float32Array[], kept: Int32Array[], counts: Int32Array, reset: boolean,
    last: Float32Array[],
  ): void {
    const { chosen, windowed } = this.geometry;
    chosen.forEach((layer, number) => {
      const [slots, most, count] = [this.geometry.slots(layer), this.geometry.keepMax(layer), this.of(counts, layer)];
      const size = this.size;
      columns(this.keys[layer], slots, 0, keys[number], most, this.heads * size, count);
      columns(this.values[layer], slots * size, 0, values[number], most * size, this.heads, count * size);
      const carried = CARRIED.filter((name) => this.scores[name]).map((name) => this.scores[name][number]);
      const perSlot = [this.positions[number], this.born[number], ...carried];
      for (let head = 0; head < this.heads; head++) {
        for (let slot = 0; slot < count; slot++) {
          const from = head * slots + kept[number][head * most + slot]; // ascending: never before its own place
          for (const each of perSlot) each[head * slots + slot] = each[from];
          if (reset) this.positions[number][head * slots + slot] = slot;
        }
      }
    });
    this.fills.set(counts);
    if (!reset) return;
    this.position = Math.max(...chosen.map((layer) => this.of(counts, layer)));
    windowed.forEach((layer, number) => {
      const slots = this.geometry.slots(layer);
      columns(this.keys[layer], slots, 0, last[number], slots, this.heads * this.size, this.filled(layer));
    });
  }

  /** Let a windowed layer forget what no query will see, if `count` more do not fit. */
  private dropOldest(layer: number, count: number): void {
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

  private all(): (Float32Array | Int32Array)[] {
    return [...this.keys, ...this.values, ...this.positions, ...this.born, ...Object.values(this.scores).flat()];
  }

  save(): Contents {
    const arrays = this.all().map((each) => each.slice());
    return { fills: this.fills.slice(), position: this.position, read: this.read, pinned: this.pinned, arrays };
  }

  load(contents: Contents): void {
    this.fills.set(contents.fills);
    [this.position, this.read, this.pinned] = [contents.position, contents.read, contents.pinned];
    this.all().forEach((each, number) => each.set(contents.arrays[number]));
  }
}

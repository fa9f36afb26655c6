// The manifest: what a bundle says of itself. Decides which bundles this runtime takes.

export const FORMAT = 5;

export type Dtype = "float32" | "int32";
export type Numbers = Float32Array | Int32Array;

/** One input or output of a graph: all of its shape is constant. */
export interface TensorSpec {
  name: string;
  dtype: Dtype;
  shape: number[];
}

export interface GraphSpec {
  file: string;
  inputs: TensorSpec[];
  outputs: TensorSpec[];
}

export interface Policy {
  label: string;
  needs: string[];
  graph: string;
  window: number;
  can_be_blind: boolean;
}

export interface Manifest {
  format: number;
  model: { layers: number; kv_heads: number; head_size: number; vocab_size: number };
  pot: {
    slots: number;
    chunk: number;
    keep: number;
    keep_max: number;
    catalyst_width: number;
    sink: number;
    recent: number;
    positions: number;
    layer_slots: number[];
    windows: number[];
  };
  policies: Policy[];
  catalyst: string;
  source: string;
  eos_token_ids: number[];
  graphs: Record<string, GraphSpec>;
  weights: string;
  files: Record<string, { size: number; sha256: string }>;
  runtime: string;
  in_place: boolean;
  pot_dtype: string;
}

/** What a person can change; anything else is a mistake of ours. */
export class PotError extends Error {}

export function parse(text: string): Manifest {
  const manifest = JSON.parse(text) as Manifest;
  if (manifest.format !== FORMAT) {
    throw new PotError(`the bundle has format ${manifest.format}, and this page reads ${FORMAT}`);
  }
  const names = [...Object.keys(manifest.files), ...Object.values(manifest.graphs).map((graph) => graph.file)];
  const outside = [...names, manifest.weights].find((name) => /^$|^\.|[/\\]/.test(name));
  if (outside !== undefined) throw new PotError(`the bundle names the file ${outside}, which is not in its folder`);
  const specs = Object.values(manifest.graphs).flatMap((graph) => [...graph.inputs, ...graph.outputs]);
  const other = specs.find((spec) => spec.dtype !== "float32" && spec.dtype !== "int32");
  if (manifest.runtime !== "onnxruntime" || manifest.in_place || manifest.pot_dtype || other) {
    throw new PotError("the bundle is for another runtime; build it with: potexport build --target web");
  }
  return manifest;
}

/** The policy of this label, the first without one. */
export function policyOf(manifest: Manifest, label?: string): Policy {
  const found = label === undefined ? manifest.policies[0] : manifest.policies.find((each) => each.label === label);
  if (found === undefined) throw new PotError(`the bundle has no policy ${label}`);
  return found;
}

/** What scores the pot where nothing else was said. */
export function catalystOf(manifest: Manifest, policy: Policy): string {
  const shared = !manifest.policies.every((each) => each.can_be_blind);
  return policy.can_be_blind && shared ? "" : manifest.catalyst;
}

/** Whether any of the policies needs this: the model graphs serve all of them. */
export function gathered(manifest: Manifest, what: string): boolean {
  return manifest.policies.some((policy) => policy.needs.includes(what));
}

/** The sizes of each layer, and which layers are compressed. */
export class Geometry {
  readonly layers: number;
  readonly counts: number; // numbers that say how full the pot is: 1, or one a layer
  readonly chosen: number[];
  readonly windowed: number[];
  readonly smallest: number; // what the smallest layer has more than `slots`: 0 or less
  readonly widest: number;

  constructor(readonly manifest: Manifest) {
    const { pot, model } = manifest;
    const all = Array.from({ length: model.layers }, (_, layer) => layer);
    this.layers = model.layers;
    this.counts = pot.layer_slots.length || pot.windows.length ? model.layers : 1;
    this.chosen = all.filter((layer) => !this.window(layer));
    this.windowed = all.filter((layer) => this.window(layer));
    this.smallest = Math.min(0, ...all.map((layer) => this.more(layer)));
    this.widest = Math.max(pot.chunk, pot.catalyst_width);
  }

  window(layer: number): number {
    return this.manifest.pot.windows[layer] ?? 0;
  }

  /** Slots that a layer has, and keeps, more than the average; may be negative. */
  more(layer: number): number {
    const { layer_slots, slots } = this.manifest.pot;
    return layer_slots.length ? layer_slots[layer] - slots : 0;
  }

  /** What a windowed layer keeps when it makes room. */
  windowKept(layer: number): number {
    return this.window(layer) + this.manifest.pot.catalyst_width;
  }

  slots(layer: number): number {
    const { slots, chunk } = this.manifest.pot;
    return this.window(layer) ? this.windowKept(layer) + chunk : slots + this.more(layer);
  }

  keepMax(layer: number): number {
    return this.manifest.pot.keep_max + this.more(layer);
  }
}

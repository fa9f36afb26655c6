// The graphs of a bundle in onnxruntime-web. Decides when each is opened and closed again; each has
// weights of its own in WebAssembly's memory, which ends at 4 GB.

import type { InferenceSession, Tensor } from "onnxruntime-common";
import { PotError, type Manifest, type Numbers, type TensorSpec } from "./manifest";

/** The part of onnxruntime-web that is used; the same in a browser and in node. */
export interface Ort {
  InferenceSession: { create(model: Uint8Array, options: InferenceSession.SessionOptions): Promise<InferenceSession> };
  Tensor: new (type: string, data: Numbers, dims: readonly number[]) => Tensor;
}

/** Gives a file of the bundle. */
export type Reader = (file: string) => Promise<Uint8Array>;

export type Values = Record<string, Numbers>;

export const BUDGET = 3 * 2 ** 30; // bytes of weights that are open together; the pot needs room, too

interface Open {
  session: InferenceSession;
  bytes: number;
}

export class Graphs {
  private readonly open = new Map<string, Open>(); // the last used comes last
  onOpen: (name: string) => void = () => {};

  constructor(
    readonly manifest: Manifest,
    private readonly ort: Ort,
    private readonly read: Reader,
    private readonly providers: string[] = ["wasm"],
    private readonly budget = BUDGET,
  ) {
    const weights = manifest.files[manifest.weights].size;
    if (weights > budget) {
      throw new PotError(
        `the weights take ${weights} bytes, and WebAssembly has room for ${budget}; use a smaller model`,
      );
    }
  }

  /** Run a graph. given: all of its inputs, by name; of the outputs, all. */
  async run(name: string, given: Values): Promise<Values> {
    const { session } = await this.session(name);
    const spec = this.manifest.graphs[name];
    const feeds: Record<string, Tensor> = {};
    for (const { name: input, dtype, shape } of spec.inputs) {
      const data = given[input];
      if (data === undefined) throw new Error(`nothing to give ${name} for ${input}`);
      feeds[input] = new this.ort.Tensor(dtype, data, shape);
    }
    const found = await session.run(feeds);
    return Object.fromEntries(spec.outputs.map((output) => [output.name, found[output.name].data as Numbers]));
  }

  get names(): string[] {
    return [...this.open.keys()];
  }

  /** The session of a graph, opened if it is not; those used longest ago give way. */
  private async session(name: string): Promise<Open> {
    const known = this.open.get(name);
    if (known) {
      this.open.delete(name);
      this.open.set(name, known);
      return known;
    }
    const { weights, files, graphs } = this.manifest;
    const { file } = graphs[name];
    // A compression has tables alone; a model graph reads nearly all weights.
    const bytes = name.startsWith("compress") ? 0 : files[weights].size;
    for (const [old, { session, bytes: freed }] of this.open) {
      if (!freed || bytes + this.bytes <= this.budget) continue;
      this.open.delete(old);
      await session.release();
    }
    this.onOpen(name);
    const session = await this.ort.InferenceSession.create(await this.read(file), {
      executionProviders: this.providers,
      externalData: [{ path: weights, data: await this.read(weights) }],
    });
    this.check(name, session);
    const opened = { session, bytes };
    this.open.set(name, opened);
    return opened;
  }

  private get bytes(): number {
    return [...this.open.values()].reduce((sum, each) => sum + each.bytes, 0);
  }

  /** Refuse a file that does not declare what the manifest does. */
  private check(name: string, session: InferenceSession): void {
    const spec = this.manifest.graphs[name];
    const told = (each: TensorSpec) => `${each.name} ${each.dtype} ${each.shape.join()}`;
    const declared = [...session.inputMetadata, ...session.outputMetadata].map((each) =>
      each.isTensor ? `${each.name} ${each.type} ${each.shape.join()}` : each.name,
    );
    const expected = [...spec.inputs, ...spec.outputs].map(told);
    const wrong = expected.filter((each) => !declared.includes(each));
    if (wrong.length || declared.length !== expected.length) {
      throw new PotError(`${spec.file} does not have ${wrong[0] ?? "the tensors"} that the manifest declares`);
    }
  }

  async close(): Promise<void> {
    for (const { session } of this.open.values()) await session.release();
    this.open.clear();
  }
}

// The worker of the page: it holds the session, so that the page stays responsive.

import type { News, Order, View } from "./messages";
import { PotError, blocks, frame, open, read, type Ort, type Session, type State } from "./runtime";

const EVERY = 100; // ms between two pictures of the pot
const OLD = "the text must be read again"; // after a stop
let session: Session;
let before: State | null = null; // the pot as it was before any question
let [stopping, shown] = [false, 0];

const tell = (news: News, transfer: Transferable[] = []) => postMessage(news, { transfer });

/** Let messages in: graphs run without a pause. */
const pause = () => new Promise<void>((done) => setTimeout(done));

async function file(name: string): Promise<Uint8Array> {
  const answer = await fetch(new URL(`bundle/${name}`, import.meta.url));
  if (!answer.ok) throw new PotError(`the server does not give ${name}: ${answer.status}`);
  return new Uint8Array(await answer.arrayBuffer());
}

async function begin({ backend, policy, threads }: Extract<Order, { kind: "open" }>): Promise<void> {
  const name = backend === "webnn" ? "ort.webgpu.min.mjs" : "ort.wasm.min.mjs";
  const ort = (await import(new URL(`ort/${name}`, import.meta.url).href)) as Ort & { env: any };
  ort.env.wasm.wasmPaths = new URL("ort/", import.meta.url).href;
  const most = crossOriginIsolated ? navigator.hardwareConcurrency : 1;
  ort.env.wasm.numThreads = Math.min(threads ?? most, most);
  const providers = backend === "webnn" ? ["webnn", "wasm"] : ["wasm"];
  session = await open(ort, file, { providers, policy });
  session.graphs.onOpen = (graph) => tell({ kind: "loading", graph });
  const { source, pot, policies } = session.manifest;
  tell({
    kind: "opened", source, slots: pot.slots, policies: policies.map((each) => each.label),
    threads: ort.env.wasm.numThreads, backend,
  });
}

function view(): View {
  const { pot, stats } = session;
  const { geometry } = pot;
  const widths = geometry.chosen.map((layer) => geometry.slots(layer));
  const slots = Math.max(...widths);
  const born = new Int32Array(pot.heads * widths.length * slots).fill(-1);
  const fills: number[] = [];
  geometry.chosen.forEach((layer, number) => {
    for (let head = 0; head < pot.heads; head++) {
      const from = head * widths[number];
      born.set(pot.born[number].subarray(from, from + pot.filled(layer)), fills.length * slots);
      fills.push(pot.filled(layer));
    }
  });
  return { born, fills, slots, position: pot.position, read: pot.read, stats: { ...stats } };
}

/** Tell how far reading is, but not at every chunk; and stop if that was asked for. */
async function progress(share: number): Promise<void> {
  const now = performance.now();
  if (now - shown > EVERY) {
    shown = now;
    const seen = view();
    tell({ kind: "progress", share, view: seen }, [seen.born.buffer]);
  }
  await pause();
  if (stopping) throw new Stopped();
}

class Stopped extends Error {}

/** A file's bytes; `taken` is told how many were given. */
async function* bytes(given: Blob, taken: (count: number) => void): AsyncGenerator<Uint8Array> {
  const step = 1 << 18;
  for (let at = 0; at < given.size; at += step) {
    const part = new Uint8Array(await given.slice(at, at + step).arrayBuffer());
    taken(at + part.length);
    yield part;
  }
}

async function readFile({ file: given, question, answer }: Extract<Order, { kind: "read" }>): Promise<void> {
  before = null;
  session.reset();
  session.setCatalyst(question || session.general);
  let taken = 0;
  const document = blocks(bytes(given, (count) => (taken = count)));
  await read(session, document, frame(session.text, question), {
    answer,
    share: () => taken / given.size,
    onProgress: (done, total) => progress(done / total),
    onText: () => (before = session.snapshot()),
  });
  await say(answer);
}

async function ask({ question, answer }: Extract<Order, { kind: "ask" }>): Promise<void> {
  if (before === null) throw new PotError(`there is nothing to ask about; ${OLD}`);
  session.restore(before);
  session.setCatalyst(question);
  await session.feed(frame(session.text, question).tail, answer, () => progress(1));
  await say(answer);
}

async function say(answer: number): Promise<void> {
  const stream = session.text.stream();
  for await (const token of session.generate(answer)) {
    tell({ kind: "text", piece: stream.push(token), token });
    await progress(1);
  }
  tell({ kind: "text", piece: stream.flush(), token: -1 });
}

async function follow(order: Order): Promise<void> {
  stopping = false;
  if (order.kind === "open") return begin(order);
  if (order.kind === "read") await readFile(order);
  if (order.kind === "ask") await ask(order);
  tell({ kind: "done", view: view(), stopped: false });
}

function failed(error: unknown): void {
  if (error instanceof Stopped) return tell({ kind: "done", view: view(), stopped: true });
  const plain = error instanceof PotError ? error.message : `${error}`;
  tell({ kind: "failed", message: plain });
}

let busy: Promise<void> = Promise.resolve();
addEventListener("message", ({ data }: MessageEvent<Order>) => {
  if (data.kind === "stop") stopping = true;
  else busy = busy.then(() => follow(data)).catch(failed);
});

// src/worker.ts
import { PotError, blocks, frame, open, read } from "./runtime.js";
var EVERY = 100;
var OLD = "the text must be read again";
var session;
var before = null;
var [stopping, shown] = [false, 0];
var tell = (news, transfer = []) => postMessage(news, { transfer });
var pause = () => new Promise((done) => setTimeout(done));
async function file(name) {
  const answer = await fetch(new URL(`bundle/${name}`, import.meta.url));
  if (!answer.ok) throw new PotError(`the server does not give ${name}: ${answer.status}`);
  return new Uint8Array(await answer.arrayBuffer());
}
async function begin({ backend, policy, threads }) {
  const name = backend === "webnn" ? "ort.webgpu.min.mjs" : "ort.wasm.min.mjs";
  const ort = await import(new URL(`ort/${name}`, import.meta.url).href);
  ort.env.wasm.wasmPaths = new URL("ort/", import.meta.url).href;
  const most = crossOriginIsolated ? navigator.hardwareConcurrency : 1;
  ort.env.wasm.numThreads = Math.min(threads ?? most, most);
  const providers = backend === "webnn" ? ["webnn", "wasm"] : ["wasm"];
  session = await open(ort, file, { providers, policy });
  session.graphs.onOpen = (graph) => tell({ kind: "loading", graph });
  const { source, pot, policies } = session.manifest;
  tell({
    kind: "opened",
    source,
    slots: pot.slots,
    policies: policies.map((each) => each.label),
    threads: ort.env.wasm.numThreads,
    backend
  });
}
function view() {
  const { pot, stats } = session;
  const { geometry } = pot;
  const widths = geometry.chosen.map((layer) => geometry.slots(layer));
  const slots = Math.max(...widths);
  const born = new Int32Array(pot.heads * widths.length * slots).fill(-1);
  const fills = [];
  geometry.chosen.forEach((layer, number) => {
    for (let head = 0; head < pot.heads; head++) {
      const from = head * widths[number];
      born.set(pot.born[number].subarray(from, from + pot.filled(layer)), fills.length * slots);
      fills.push(pot.filled(layer));
    }
  });
  return { born, fills, slots, position: pot.position, read: pot.read, stats: { ...stats } };
}
async function progress(share) {
  const now = performance.now();
  if (now - shown > EVERY) {
    shown = now;
    const seen = view();
    tell({ kind: "progress", share, view: seen }, [seen.born.buffer]);
  }
  await pause();
  if (stopping) throw new Stopped();
}
var Stopped = class extends Error {
};
async function* bytes(given, taken) {
  const step = 1 << 18;
  for (let at = 0; at < given.size; at += step) {
    const part = new Uint8Array(await given.slice(at, at + step).arrayBuffer());
    taken(at + part.length);
    yield part;
  }
}
async function readFile({ file: given, question, answer }) {
  before = null;
  session.reset();
  session.setCatalyst(question || session.general);
  let taken = 0;
  const document = blocks(bytes(given, (count) => taken = count));
  await read(session, document, frame(session.text, question), {
    answer,
    share: () => taken / given.size,
    onProgress: (done, total) => progress(done / total),
    onText: () => before = session.snapshot()
  });
  await say(answer);
}
async function ask({ question, answer }) {
  if (before === null) throw new PotError(`there is nothing to ask about; ${OLD}`);
  session.restore(before);
  session.setCatalyst(question);
  await session.feed(frame(session.text, question).tail, answer, () => progress(1));
  await say(answer);
}
async function say(answer) {
  const stream = session.text.stream();
  for await (const token of session.generate(answer)) {
    tell({ kind: "text", piece: stream.push(token), token });
    await progress(1);
  }
  tell({ kind: "text", piece: stream.flush(), token: -1 });
}
async function follow(order) {
  stopping = false;
  if (order.kind === "open") return begin(order);
  if (order.kind === "read") await readFile(order);
  if (order.kind === "ask") await ask(order);
  tell({ kind: "done", view: view(), stopped: false });
}
function failed(error) {
  if (error instanceof Stopped) return tell({ kind: "done", view: view(), stopped: true });
  const plain = error instanceof PotError ? error.message : `${error}`;
  tell({ kind: "failed", message: plain });
}
var busy = Promise.resolve();
addEventListener("message", ({ data }) => {
  if (data.kind === "stop") stopping = true;
  else busy = busy.then(() => follow(data)).catch(failed);
});

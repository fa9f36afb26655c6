// Runs in a browser, beside the page's own runtime: reads and generates as it is asked, and says what it got.
import * as ort from "./ort/ort.wasm.min.mjs";
import { open } from "./runtime.js";

ort.env.wasm.wasmPaths = new URL("ort/", import.meta.url).href;
ort.env.wasm.numThreads = crossOriginIsolated ? 2 : 0; // 0 would fail: threads are part of what is tested

const read = (bundle) => async (file) => {
  const answer = await fetch(`bundles/${bundle}/${file}`);
  if (!answer.ok) throw new Error(`${file}: ${answer.status}`);
  return new Uint8Array(await answer.arrayBuffer());
};

async function one({ bundle, policy, question, pinned, parts, steps, keep, budget }) {
  const session = await open(ort, read(bundle), { policy, budget });
  if (keep) session.keep = keep;
  session.setCatalyst(question);
  if (pinned) {
    await session.feed(session.text.encode(pinned));
    session.pin();
  }
  for (const part of parts) await session.feed(session.text.encode(part, false));
  const state = session.snapshot();
  const ask = async () => {
    const tokens = [];
    for await (const token of session.generate(steps)) tokens.push(token);
    return tokens;
  };
  const tokens = await ask();
  const positions = session.pot.positions.map((each) => [...each]);
  const { compressions, resets } = session.stats;
  session.restore(state);
  const again = await ask();
  const { names } = session.graphs;
  await session.graphs.close();
  return { tokens, again, positions, compressions, resets, fill: session.pot.fill, graphs: names };
}

async function all() {
  const cases = await (await fetch("cases.json")).json();
  const found = [];
  for (const each of cases) found.push(await one(each));
  return found;
}

const told = await all().catch((error) => ({ failed: `${error.stack ?? error}` }));
await fetch("done", { method: "POST", body: JSON.stringify(told) });

// The page: a file and a question go to the worker; an answer and pictures of the pot come back.

import { drawSlots, drawText } from "./drawing";
import type { News, Order, View } from "./messages";

const ANSWER = 200; // tokens
const element = <Kind extends HTMLElement>(id: string) => document.getElementById(id) as Kind;
const [form, file, question] = [
  element<HTMLFormElement>("form"), element<HTMLInputElement>("file"), element<HTMLTextAreaElement>("question"),
];
const [go, stop, backend] = [
  element<HTMLButtonElement>("go"), element<HTMLButtonElement>("stop"), element<HTMLSelectElement>("backend"),
];
const [status, bar, answers, zone] = [
  element("status"), element<HTMLProgressElement>("bar"), element("answers"), element("zone"),
];
let worker: Worker;
let [ready, busy, held] = [false, false, null as File | null]; // held: the file that was read
let answer: HTMLElement | null = null;
let shown: View | null = null;

const send = (order: Order) => worker.postMessage(order);
const number = (value: number) => Math.round(value).toLocaleString("en-US");
const rate = (count: number, seconds: number) => (seconds > 0 ? `${number(count / seconds)}/s` : "–");

function start(): void {
  worker?.terminate();
  [ready, held] = [false, null];
  worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  worker.addEventListener("message", ({ data }: MessageEvent<News>) => heard(data));
  worker.addEventListener("error", (event) => fail(event.message || "the worker could not start"));
  const asked = new URLSearchParams(location.search);
  const threads = Number(asked.get("threads")) || undefined;
  send({ kind: "open", backend: backend.value as "wasm" | "webnn", policy: asked.get("policy") ?? undefined, threads });
  working("Opening the bundle");
}

function working(what: string): void {
  busy = true;
  status.textContent = `${what} …`;
  status.classList.remove("failed");
  update();
}

function idle(what: string): void {
  busy = false;
  status.textContent = what;
  bar.hidden = true;
  update();
}

function fail(message: string): void {
  idle(message);
  status.classList.add("failed");
}

function update(): void {
  const same = held !== null && held === file.files?.[0];
  go.disabled = busy || !ready || !(file.files?.length && (question.value.trim() || !same));
  go.textContent = same ? "Ask" : question.value.trim() ? "Read and answer" : "Read";
  stop.disabled = !busy || !ready;
  backend.disabled = busy && ready;
  element("chosen").textContent = file.files?.[0] ? `${file.files[0].name}, ${size(file.files[0].size)}` : "";
  document.documentElement.dataset.state = busy ? "busy" : ready ? "ready" : "closed";
}

const size = (bytes: number) => (bytes < 1e6 ? `${number(bytes / 1e3)} KB` : `${(bytes / 1e6).toFixed(1)} MB`);

function heard(news: News): void {
  if (news.kind === "opened") {
    ready = true;
    element("bundle").textContent = news.source;
    idle(`Ready: ${number(news.slots)} slots, ${news.threads} thread${news.threads === 1 ? "" : "s"}. Choose a text.`);
  } else if (news.kind === "loading") status.textContent = `Opening the graph ${news.graph} …`;
  else if (news.kind === "progress") {
    if (!answer?.textContent) status.textContent = news.share < 1 ? "Reading …" : "Answering …";
    [bar.hidden, bar.value] = [news.share >= 1, news.share];
    draw(news.view);
  } else if (news.kind === "text") {
    if (answer) answer.textContent += news.piece;
  } else if (news.kind === "done") {
    draw(news.view);
    if (news.stopped) held = null;
    answers.setAttribute("aria-busy", "false");
    idle(news.stopped ? "Stopped; the text must be read again." : "Done. Ask again, or choose another text.");
  } else {
    held = null; // whatever the pot holds now
    fail(news.message);
  }
}

function draw(view: View): void {
  shown = view;
  const { stats } = view;
  drawSlots(element<HTMLCanvasElement>("slots"), view);
  drawText(element<HTMLCanvasElement>("text"), view);
  const fill = Math.max(...view.fills);
  const tell = (id: string, value: string) => (element(id).textContent = value);
  tell("tokens", number(stats.read));
  tell("filled", `${number(fill)} of ${number(view.slots)}`);
  tell("compressions", stats.resets ? `${stats.compressions}, ${stats.resets} with a reset` : `${stats.compressions}`);
  tell("reading", rate(stats.read, stats.readSeconds + stats.compressSeconds));
  tell("answering", rate(stats.generated, stats.generateSeconds));
  const kept = new Set(view.born).size - 1;
  element("slots").setAttribute(
    "aria-label",
    `${fill} of ${view.slots} slots are filled in ${view.fills.length} heads, after ${stats.compressions} compressions`,
  );
  element("text").setAttribute("aria-label", `${kept} of ${view.read} tokens are still held by at least one head`);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (go.disabled) return;
  const [chosen, asked] = [file.files![0], question.value.trim()];
  const item = document.createElement("article");
  const title = document.createElement("h3");
  title.textContent = asked || `What follows ${chosen.name}`;
  answer = document.createElement("p");
  item.append(title, answer);
  answers.prepend(item);
  answers.setAttribute("aria-busy", "true");
  working(held === chosen ? "Answering" : "Reading");
  if (held === chosen) send({ kind: "ask", question: asked, answer: ANSWER });
  else send({ kind: "read", file: chosen, question: asked, answer: ANSWER });
  held = chosen;
  update();
});
stop.addEventListener("click", () => send({ kind: "stop" }));
backend.addEventListener("change", start);
for (const each of [file, question]) each.addEventListener("input", update);
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) [event.preventDefault(), form.requestSubmit()];
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    zone.classList.toggle("over", kind === "dragover");
    const dropped = (event as DragEvent).dataTransfer?.files;
    if (kind !== "drop" || !dropped?.length || busy) return;
    file.files = dropped;
    update();
    question.focus();
  });
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => shown && draw(shown));
if (!("ml" in navigator)) element<HTMLOptionElement>("webnn").disabled = true;
start();

// src/drawing.ts
var DARK = matchMedia("(prefers-color-scheme: dark)");
var STEPS = 255;
function palette() {
  const dark = DARK.matches;
  const [old, young] = dark ? [[58, 82, 140], [255, 196, 92]] : [[24, 66, 130], [240, 148, 40]];
  const middle = dark ? [88, 176, 160] : [62, 148, 132];
  const empty = dark ? 38 : 226;
  const colours = new Uint8ClampedArray((STEPS + 2) * 4).fill(empty);
  for (let step = 0; step <= STEPS; step++) {
    const age = step / STEPS;
    const [from, to, share] = age < 0.5 ? [old, middle, age * 2] : [middle, young, age * 2 - 1];
    for (let n = 0; n < 3; n++) colours[step * 4 + n] = from[n] + (to[n] - from[n]) * share;
  }
  for (let at = 3; at < colours.length; at += 4) colours[at] = 255;
  return colours;
}
function drawSlots(canvas, view) {
  const rows = view.fills.length;
  [canvas.width, canvas.height] = [view.slots, rows];
  const image = new ImageData(view.slots, rows);
  const [from, to] = [new Uint32Array(palette().buffer), new Uint32Array(image.data.buffer)];
  const newest = Math.max(1, view.read - 1);
  for (let at = 0; at < to.length; at++) {
    const token = view.born[at];
    to[at] = from[token < 0 ? STEPS + 1 : Math.round(token * STEPS / newest)];
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}
function drawText(canvas, view) {
  const [width, height] = [canvas.width = 512, canvas.height = 64];
  const bars = new Float64Array(width);
  const total = Math.max(1, view.read);
  for (const token of view.born) if (token >= 0) bars[Math.min(width - 1, Math.floor(token * width / total))] += 1;
  const most = Math.max(total / width * view.fills.length, 1);
  const context = canvas.getContext("2d");
  const colours = palette();
  context.clearRect(0, 0, width, height);
  bars.forEach((held2, n) => {
    const tall = Math.min(1, held2 / most) ** 0.5 * height;
    const at = Math.round(n * STEPS / width) * 4;
    context.fillStyle = `rgb(${colours.subarray(at, at + 3).join()})`;
    context.fillRect(n, height - tall, 1, tall);
  });
}

// src/page.ts
var ANSWER = 200;
var element = (id) => document.getElementById(id);
var [form, file, question] = [
  element("form"),
  element("file"),
  element("question")
];
var [go, stop, backend] = [
  element("go"),
  element("stop"),
  element("backend")
];
var [status, bar, answers, zone] = [
  element("status"),
  element("bar"),
  element("answers"),
  element("zone")
];
var worker;
var [ready, busy, held] = [false, false, null];
var answer = null;
var shown = null;
var send = (order) => worker.postMessage(order);
var number = (value) => Math.round(value).toLocaleString("en-US");
var rate = (count, seconds) => seconds > 0 ? `${number(count / seconds)}/s` : "–";
function start() {
  worker?.terminate();
  [ready, held] = [false, null];
  worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  worker.addEventListener("message", ({ data }) => heard(data));
  worker.addEventListener("error", (event) => fail(event.message || "the worker could not start"));
  const asked = new URLSearchParams(location.search);
  const threads = Number(asked.get("threads")) || void 0;
  send({ kind: "open", backend: backend.value, policy: asked.get("policy") ?? void 0, threads });
  working("Opening the bundle");
}
function working(what) {
  busy = true;
  status.textContent = `${what} …`;
  status.classList.remove("failed");
  update();
}
function idle(what) {
  busy = false;
  status.textContent = what;
  bar.hidden = true;
  update();
}
function fail(message) {
  idle(message);
  status.classList.add("failed");
}
function update() {
  const same = held !== null && held === file.files?.[0];
  go.disabled = busy || !ready || !(file.files?.length && (question.value.trim() || !same));
  go.textContent = same ? "Ask" : question.value.trim() ? "Read and answer" : "Read";
  stop.disabled = !busy || !ready;
  backend.disabled = busy && ready;
  element("chosen").textContent = file.files?.[0] ? `${file.files[0].name}, ${size(file.files[0].size)}` : "";
  document.documentElement.dataset.state = busy ? "busy" : ready ? "ready" : "closed";
}
var size = (bytes) => bytes < 1e6 ? `${number(bytes / 1e3)} KB` : `${(bytes / 1e6).toFixed(1)} MB`;
function heard(news) {
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
    held = null;
    fail(news.message);
  }
}
function draw(view) {
  shown = view;
  const { stats } = view;
  drawSlots(element("slots"), view);
  drawText(element("text"), view);
  const fill = Math.max(...view.fills);
  const tell = (id, value) => element(id).textContent = value;
  tell("tokens", number(stats.read));
  tell("filled", `${number(fill)} of ${number(view.slots)}`);
  tell("compressions", stats.resets ? `${stats.compressions}, ${stats.resets} with a reset` : `${stats.compressions}`);
  tell("reading", rate(stats.read, stats.readSeconds + stats.compressSeconds));
  tell("answering", rate(stats.generated, stats.generateSeconds));
  const kept = new Set(view.born).size - 1;
  element("slots").setAttribute(
    "aria-label",
    `${fill} of ${view.slots} slots are filled in ${view.fills.length} heads, after ${stats.compressions} compressions`
  );
  element("text").setAttribute("aria-label", `${kept} of ${view.read} tokens are still held by at least one head`);
}
form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (go.disabled) return;
  const [chosen, asked] = [file.files[0], question.value.trim()];
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
    const dropped = event.dataTransfer?.files;
    if (kind !== "drop" || !dropped?.length || busy) return;
    file.files = dropped;
    update();
    question.focus();
  });
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => shown && draw(shown));
if (!("ml" in navigator)) element("webnn").disabled = true;
start();

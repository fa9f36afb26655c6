// Uses the page as a person would: chooses a file, asks, asks again; then says what is to be seen.
const until = async (test) => {
  while (!test()) {
    if (document.getElementById("status").classList.contains("failed")) throw new Error(document.body.innerText);
    await new Promise((done) => setTimeout(done, 20));
  }
};
const element = (id) => document.getElementById(id);
const state = () => document.documentElement.dataset.state;
const answer = () => element("answers").querySelector("p").textContent;

async function use() {
  const { text, questions, backend } = await (await fetch("hands.json")).json();
  await until(() => state() === "ready");
  if (backend && backend !== element("backend").value) {
    element("backend").value = backend;
    element("backend").dispatchEvent(new Event("change", { bubbles: true }));
    await until(() => state() === "ready");
  }
  const given = new DataTransfer();
  given.items.add(new File([text], "book.txt", { type: "text/plain" }));
  element("file").files = given.files;
  element("file").dispatchEvent(new Event("input", { bubbles: true }));
  const answers = [];
  for (const question of questions) {
    element("question").value = question;
    element("question").dispatchEvent(new Event("input", { bubbles: true }));
    element("go").click();
    await until(() => state() === "busy");
    await until(() => state() === "ready");
    answers.push(answer());
  }
  const picture = element("slots").getContext("2d").getImageData(0, 0, element("slots").width, element("slots").height);
  const colours = new Set(new Uint32Array(picture.data.buffer));
  const seen = Object.fromEntries(["tokens", "filled", "compressions", "reading", "answering", "status"].map((id) => [id, element(id).textContent]));
  return { answers, seen, colours: colours.size, label: element("slots").getAttribute("aria-label"), isolated: crossOriginIsolated };
}

const told = await use().catch((error) => ({ failed: `${error.stack ?? error}` }));
await fetch("done", { method: "POST", body: JSON.stringify(told) });

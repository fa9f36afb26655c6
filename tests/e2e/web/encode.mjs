// Runs in node: `node encode.mjs RUNTIME`, with {tokenizer, config, template, texts, ids} on its input.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const { Text, blocks, frame, pieces } = await import(pathToFileURL(process.argv[2]).href);
const given = JSON.parse(readFileSync(0, "utf8"));
const text = new Text(given.tokenizer, given.config, given.template);
const gathered = async (all) => {
  const found = [];
  for await (const each of all) found.push(...each);
  return found;
};
async function* bytes(whole) {
  const data = new TextEncoder().encode(whole);
  for (let at = 0; at < data.length; at += 1013) yield data.subarray(at, at + 1013); // cuts characters, too
}
const streamed = (ids) => {
  const stream = text.stream();
  return ids.map((id) => stream.push(id)).concat(stream.flush());
};
const told = {
  trusted: given.texts.map((each) => text.encode(each)),
  untrusted: given.texts.map((each) => text.encode(each, false)),
  decoded: given.ids.map((each) => text.decode(each)),
  streamed: given.ids.map(streamed),
  frame: text.hasTemplate ? frame(text, given.question) : null,
  pieces: await gathered(pieces(text, blocks(bytes(given.long)), false)),
};
process.stdout.write(JSON.stringify(told));

// All that a page, or a program in node, needs to drive a bundle. No path of a browser is used here.

import { Graphs, type Ort, type Reader } from "./graphs";
import { parse } from "./manifest";
import { Session } from "./session";
import { Text } from "./text";

export { Graphs, type Ort, type Reader } from "./graphs";
export { PotError, type Manifest } from "./manifest";
export { blocks, frame, pieces, read, type Frame } from "./reading";
export { Session, type State, type Stats } from "./session";
export { Stream, Text } from "./text";

export interface Opening {
  policy?: string; // a label; the bundle's first without one
  providers?: string[]; // of onnxruntime-web
  budget?: number; // bytes of weights that are open together
}

/** Open a bundle. ort: onnxruntime-web. read: gives a file of the bundle. */
export async function open(ort: Ort, read: Reader, options: Opening = {}): Promise<Session> {
  const decoder = new TextDecoder("utf-8", { fatal: true });
  const manifest = parse(decoder.decode(await read("potexport.json")));
  const optional = async (file: string) => (file in manifest.files ? decoder.decode(await read(file)) : null);
  const [tokenizer, config, template] = [
    decoder.decode(await read("tokenizer.json")),
    await optional("tokenizer_config.json"),
    await optional("chat_template.jinja"),
  ];
  const graphs = new Graphs(manifest, ort, read, options.providers, options.budget);
  return new Session(manifest, graphs, new Text(tokenizer, config, template), options.policy);
}

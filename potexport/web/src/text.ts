// Text to ids and back, and the chat template around a document.

import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";
import { PotError } from "./manifest";

const HELD = 32; // a character has at most 4 bytes: this many tokens without one are garbage

type Json = Record<string, any>;

export class Text {
  private readonly trusted: Tokenizer;
  private readonly literal: Tokenizer; // reads special tokens as letters
  private readonly controls: string[]; // their names
  private readonly specialIds: Set<number>;
  private readonly specials: Record<string, string> = {};
  private readonly template: Template | null;

  /** Of the files of the same names; config and template may be missing. */
  constructor(tokenizer: string, config: string | null, template: string | null) {
    const document = JSON.parse(tokenizer) as Json;
    document.truncation = document.padding = null;
    const settings: Json = { clean_up_tokenization_spaces: false };
    this.trusted = new Tokenizer(document, settings);
    const added = document.added_tokens as Json[];
    this.specialIds = new Set(added.filter((each) => each.special).map((each) => each.id as number));
    const told = (config === null ? {} : JSON.parse(config)) as Json;
    for (const [name, value] of Object.entries(told)) {
      const token = value?.content ?? value;
      if (name.endsWith("_token") && typeof token === "string") this.specials[name] = token;
    }
    // BOS, EOS and their like are control tokens, marked as such or not.
    const named = new Set(Object.values(this.specials));
    const control = (each: Json) => each.special || named.has(each.content);
    this.controls = added.filter(control).map((each) => each.content as string);
    const others = added.filter((each) => !control(each));
    this.literal = new Tokenizer({ ...document, added_tokens: others }, settings);
    const source = template ?? oldTemplate(told);
    this.template = source === null ? null : new Template(source);
  }

  get hasTemplate(): boolean {
    return this.template !== null;
  }

  /** Ids of a text; trusted: special tokens written in it count as such. Nothing is added. */
  encode(text: string, trusted = true): number[] {
    if (!text) return [];
    return (trusted ? this.trusted : this.literal).encode(text, { add_special_tokens: false }).ids;
  }

  /** The text of ids, without special tokens. */
  decode(ids: number[]): string {
    const known = ids.filter((id) => this.hasText(id));
    return known.length ? this.trusted.decode(known, { clean_up_tokenization_spaces: false }) : "";
  }

  hasText(id: number): boolean {
    return this.trusted.id_to_token(id) !== undefined && !this.specialIds.has(id);
  }

  stream(): Stream {
    return new Stream(this);
  }

  /** What stands before and after a document in a chat; only a placeholder is rendered. */
  frame(after: string): [string, string] {
    if (this.template === null) throw new PotError("the model has no chat template");
    const name = this.controls.find((each) => after.includes(each));
    if (name !== undefined) {
      throw new PotError(`the question contains ${name}, which is a control token of the model; ask without it`);
    }
    const mark = `pOtDocument${crypto.randomUUID().replaceAll("-", "")}`;
    const messages = [{ role: "user", content: mark + after }];
    const given = { tools: null, documents: null, add_generation_prompt: true, ...this.specials, messages };
    const parts = this.template.render(given).split(mark);
    if (parts.length !== 2) throw new PotError("the chat template does not give back what a user says");
    return [parts[0], parts[1]];
  }

  /** What a text without a chat template begins with. */
  beginning(): number[] {
    const id = this.trusted.token_to_id(this.specials.bos_token ?? "");
    const first = this.trusted.encode("", { add_special_tokens: true }).ids[0];
    return id !== undefined && first === id ? [id] : [];
  }
}

/** Ids one by one to text that never ends within a character. */
export class Stream {
  private printed: number[] = [];
  private pending: number[] = [];

  constructor(private readonly text: Text) {}

  /** The text that a token completes, maybe none. */
  push(token: number): string {
    if (!this.text.hasText(token)) return "";
    this.pending.push(token);
    const fresh = this.fresh();
    if ((!fresh || fresh.endsWith("\ufffd")) && this.pending.length < HELD) return "";
    [this.printed, this.pending] = [this.pending, []];
    return fresh;
  }

  /** What is still held back. */
  flush(): string {
    const fresh = this.pending.length ? this.fresh() : "";
    [this.printed, this.pending] = [[...this.printed, ...this.pending].slice(-HELD), []];
    return fresh;
  }

  private fresh(): string {
    const old = this.text.decode(this.printed);
    const both = this.text.decode([...this.printed, ...this.pending]);
    return both.startsWith(old) ? both.slice(old.length) : this.text.decode(this.pending);
  }
}

/** Models saved before 2025 keep the template in the config. */
function oldTemplate(config: Json): string | null {
  const found = config.chat_template;
  if (Array.isArray(found)) return found.find((each) => each?.name === "default")?.template ?? null;
  return typeof found === "string" ? found : null;
}

// From a document of any length and a question to the calls of a session.
// Decides how a document is cut for the tokenizer, and what a session is told of what is to come.

import { PotError } from "./manifest";
import type { Session } from "./session";
import type { Text } from "./text";

export const PIECE = 1 << 16; // characters of a block
const AROUND = 1 << 10; // characters on both sides of a cut that must be encoded alike with and without it
const [TRIES, STEPS] = [4, 8]; // cuts of each kind within AROUND characters; how often to go back by AROUND
const CUTS = [/(?<=\n)(?=\S)/g, /(?=\n\S)/g, /(?= \S)/g];

/** What stands around a document; a trusted one may speak in special tokens. */
export interface Frame {
  head: number[];
  tail: number[];
  trusted: boolean;
}

/** The chat template around a document with the question behind it; without a template the question alone. */
export function frame(text: Text, question: string): Frame {
  const after = question ? `\n\n${question}` : "";
  if (!text.hasTemplate) return { head: text.beginning(), tail: text.encode(after), trusted: true };
  const [head, tail] = text.frame(after);
  return { head: text.encode(head), tail: text.encode(tail), trusted: false };
}

/** The text of UTF-8 bytes in blocks, without its byte order mark, with "\n" for any line end. */
export async function* blocks(bytes: AsyncIterable<Uint8Array>): AsyncGenerator<string> {
  const decoder = new TextDecoder("utf-8", { fatal: true });
  let held = "";
  const decode = (part?: Uint8Array) => {
    try {
      return part ? decoder.decode(part, { stream: true }) : decoder.decode();
    } catch {
      throw new PotError("the file is not UTF-8 text; convert it, for example with iconv -t UTF-8");
    }
  };
  for await (const part of bytes) {
    held += decode(part);
    const last = held.endsWith("\r") ? 1 : 0; // "\n" may follow
    held = lines(held.slice(0, held.length - last)) + held.slice(held.length - last);
    while (held.length - last > PIECE) {
      const high = /[\ud800-\udbff]/.test(held[PIECE - 1]) ? 1 : 0; // never between two halves
      yield held.slice(0, PIECE - high);
      held = held.slice(PIECE - high);
    }
  }
  held = lines(held + decode());
  if (held) yield held;
}

function lines(text: string): string {
  return text.replace(/\r\n?/g, "\n");
}

/** The ids that encoding the whole text gives, piece by piece, each of about one block. */
export async function* pieces(text: Text, given: AsyncIterable<string>, trusted: boolean): AsyncGenerator<number[]> {
  let [held, searched] = ["", 0];
  for await (const block of given) {
    held += block;
    if (held.length < Math.max(2 * AROUND, 2 * searched)) continue;
    const at = cut(text, held, searched, trusted);
    searched = held.length;
    if (at) {
      yield text.encode(held.slice(0, at), trusted);
      [held, searched] = [held.slice(at), 0];
    }
  }
  if (held) yield text.encode(held, trusted);
}

/** A place to cut, late in `held`; 0 if there is none. */
function cut(text: Text, held: string, searched: number, trusted: boolean): number {
  const last = held.length - AROUND;
  const earliest = Math.max(searched, last - STEPS * AROUND, AROUND) - AROUND;
  for (let first = last - AROUND; first >= earliest; first -= AROUND) {
    for (const kind of CUTS) {
      kind.lastIndex = first;
      for (let tried = 0; tried < TRIES; tried++) {
        const found = kind.exec(held);
        if (found === null || found.index > first + AROUND) break;
        if (found.index && joins(text, held, found.index, trusted)) return found.index;
        kind.lastIndex = found.index + 1; // what is found has no length
      }
    }
  }
  return 0;
}

function joins(text: Text, held: string, at: number, trusted: boolean): boolean {
  const [left, right] = [held.slice(Math.max(at - AROUND, 0), at), held.slice(at, at + AROUND)];
  const parts = [...text.encode(left, trusted), ...text.encode(right, trusted)];
  const both = text.encode(left + right, trusted);
  return both.length === parts.length && both.every((id, number) => id === parts[number]);
}

export interface Reading {
  answer: number; // tokens that an answer may have
  share?: () => number; // of the document that was taken so far
  onProgress?: (read: number, total: number) => Promise<void>; // tokens, all of them an estimate until the end is seen
  onText?: () => void; // the document is fed, the tail is not
}

/** Feed head, document and tail. As much is encoded ahead as fits the pot, so that the last compressions keep it. */
export async function read(
  session: Session, document: AsyncIterable<string>, around: Frame,
  { answer, onProgress, onText, share = () => 1 }: Reading,
): Promise<void> {
  const waiting = [around.head];
  let [ahead, found, done] = [around.head.length, 0, 0];
  const feed = async (toCome: number) => {
    const ids = waiting.shift()!;
    done += ids.length;
    const total = (around.head.length + found) / share();
    await session.feed(ids, toCome, async (left) => onProgress?.(done - left, total));
  };
  for await (const ids of pieces(session.text, document, around.trusted)) {
    waiting.push(ids);
    [ahead, found] = [ahead + ids.length, found + ids.length];
    while (ahead - waiting[0].length > session.manifest.pot.slots) {
      ahead -= waiting[0].length;
      await feed(ahead);
    }
  }
  if (!found) throw new PotError("the file is empty; give at least one character of text to read");
  waiting.push(around.tail);
  ahead += around.tail.length;
  while (waiting.length) {
    ahead -= waiting[0].length;
    if (waiting.length === 1) onText?.();
    await feed(ahead + answer);
  }
}

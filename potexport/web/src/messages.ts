// What the page and its worker say to each other.

import type { Stats } from "./session";

export type Order =
  | { kind: "open"; backend: "wasm" | "webnn"; policy?: string; threads?: number }
  | { kind: "read"; file: Blob; question: string; answer: number }
  | { kind: "ask"; question: string; answer: number }
  | { kind: "stop" };

/** The pot at one moment. born: which token each slot holds, row by row of `heads` rows of `slots`. */
export interface View {
  born: Int32Array;
  fills: number[]; // of each row
  slots: number;
  position: number;
  read: number; // tokens that went through the pot
  stats: Stats;
}

export type News =
  | { kind: "opened"; source: string; slots: number; policies: string[]; threads: number; backend: string }
  | { kind: "loading"; graph: string }
  | { kind: "progress"; share: number; view: View }
  | { kind: "text"; piece: string; token: number }
  | { kind: "done"; view: View; stopped: boolean }
  | { kind: "failed"; message: string };

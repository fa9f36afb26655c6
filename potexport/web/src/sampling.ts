// One row of logits: its likeliest token, and how surprising a token is. Ties go to the lowest id.

import { PotError } from "./manifest";

export function likeliest(logits: Float32Array): number {
  let best = 0;
  for (let id = 0; id < logits.length; id++) {
    if (Number.isNaN(logits[id])) throw new PotError("the graph produced NaN among its logits");
    if (logits[id] > logits[best]) best = id;
  }
  return best;
}

/** -log softmax(logits)[token], in nats. */
export function surprise(logits: Float32Array, token: number): number {
  const peak = logits[likeliest(logits)];
  let sum = 0;
  for (const logit of logits) sum += Math.exp(logit - peak);
  return Math.log(sum) - (logits[token] - peak);
}

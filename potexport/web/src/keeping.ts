// How many slots a compression keeps.

import { PotError, type Manifest, type Policy } from "./manifest";
import type { Pot } from "./pot";

/** The least and the most, on average over the layers. */
export function allowed(manifest: Manifest, pot: Pot): { least: number; most: number } {
  const { sink, recent, keep_max } = manifest.pot;
  const { smallest } = pot.geometry;
  return { least: Math.max(sink, pot.pinned) + recent - smallest, most: Math.min(keep_max, pot.fill - smallest) };
}

/** (1,) or (L,): how many slots each layer keeps; all that it has, if fewer, or if it has a window. */
export function counts(pot: Pot, keep: number): Int32Array {
  const { geometry, fills } = pot;
  if (geometry.counts === 1) return Int32Array.of(keep);
  return fills.map((fill, layer) => (geometry.window(layer) ? fill : Math.min(fill, keep + geometry.more(layer))));
}

/** The fewest slots that hold this share of the attention that the policy goes by. */
export function byMass(manifest: Manifest, pot: Pot, policy: Policy, share: number): number {
  const name = ["mass", "window", "received"].find((each) => policy.needs.includes(each));
  if (name === undefined) throw new PotError("keep is auto, and the policy looks at no attention; give a number");
  const { slots, recent, keep } = manifest.pot;
  const first = Math.max(manifest.pot.sink, pot.pinned);
  const held = new Float64Array(slots + 1);
  let total = 0;
  pot.geometry.chosen.forEach((layer, number) => {
    const sums = heldBy(pot, pot.scores[name][number], layer, first, recent);
    for (let kept = 0; kept <= slots; kept++) {
      const at = Math.min(Math.max(kept + pot.geometry.more(layer), 0), sums.length - 1);
      held[kept] += sums[at];
    }
    total += sums[sums.length - 1];
  });
  if (total <= 0) return keep;
  const found = held.findIndex((each) => each >= share * total * (1 - 1e-9));
  return found < 0 ? slots + 1 : found;
}

/** What a layer holds of its scores if it keeps 0, 1, 2, … slots: 0 until those that stay in any case fit. */
function heldBy(pot: Pot, scores: Float32Array, layer: number, first: number, recent: number): Float64Array {
  const [slots, fill] = [pot.geometry.slots(layer), pot.filled(layer)];
  const sums = new Float64Array(fill + 1);
  let stays = 0;
  for (let head = 0; head < pot.heads; head++) {
    const all = Float64Array.from(scores.subarray(head * slots, head * slots + fill));
    const free = all.slice(first, fill - recent).sort().reverse();
    const sum = (each: Float64Array) => each.reduce((a, b) => a + b, 0);
    stays += sum(all) - sum(free);
    let best = 0;
    free.forEach((each, number) => (sums[first + recent + 1 + number] += best += each));
  }
  for (let kept = first + recent; kept <= fill; kept++) sums[kept] += stays;
  return sums;
}

// Two pictures of the pot: every slot by the age of its token, and the text by who still holds it.

import type { View } from "./messages";

const DARK = matchMedia("(prefers-color-scheme: dark)");

const STEPS = 255;

/** Red, green, blue, opaque: from the first token of the text (0) to the newest (STEPS), then an empty slot. */
function palette(): Uint8ClampedArray {
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

/** A row for each head of each layer, a column for each slot. */
export function drawSlots(canvas: HTMLCanvasElement, view: View): void {
  const rows = view.fills.length;
  [canvas.width, canvas.height] = [view.slots, rows];
  const image = new ImageData(view.slots, rows);
  const [from, to] = [new Uint32Array(palette().buffer), new Uint32Array(image.data.buffer)];
  const newest = Math.max(1, view.read - 1);
  for (let at = 0; at < to.length; at++) {
    const token = view.born[at];
    to[at] = from[token < 0 ? STEPS + 1 : Math.round((token * STEPS) / newest)];
  }
  canvas.getContext("2d")!.putImageData(image, 0, 0);
}

/** The text from left to right; the taller a bar, the more of its tokens are held, over all heads. */
export function drawText(canvas: HTMLCanvasElement, view: View): void {
  const [width, height] = [(canvas.width = 512), (canvas.height = 64)];
  const bars = new Float64Array(width);
  const total = Math.max(1, view.read);
  for (const token of view.born) if (token >= 0) bars[Math.min(width - 1, Math.floor((token * width) / total))] += 1;
  const most = Math.max((total / width) * view.fills.length, 1);
  const context = canvas.getContext("2d")!;
  const colours = palette();
  context.clearRect(0, 0, width, height);
  bars.forEach((held, n) => {
    const tall = Math.min(1, held / most) ** 0.5 * height; // the root, so that little is seen
    const at = Math.round((n * STEPS) / width) * 4;
    context.fillStyle = `rgb(${colours.subarray(at, at + 3).join()})`;
    context.fillRect(n, height - tall, 1, tall);
  });
}

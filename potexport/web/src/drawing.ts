// Two pictures of the pot: every slot by the age of its token, and the text by who still holds it.

import type { View } from "./messages";

const DARK = matchMedia("(prefers-color-scheme: dark)");

/** From the first token of the text (0) to the newest (1). */
function colour(age: number): [number, number, number] {
  const dark = DARK.matches;
  const [old, young] = dark ? [[58, 82, 140], [255, 196, 92]] : [[24, 66, 130], [240, 148, 40]];
  const middle = dark ? [88, 176, 160] : [62, 148, 132];
  const [from, to, share] = age < 0.5 ? [old, middle, age * 2] : [middle, young, age * 2 - 1];
  return [0, 1, 2].map((n) => from[n] + (to[n] - from[n]) * share) as [number, number, number];
}

const empty = (): number => (DARK.matches ? 38 : 226);

/** A row for each head of each layer, a column for each slot. */
export function drawSlots(canvas: HTMLCanvasElement, view: View): void {
  const rows = view.fills.length;
  [canvas.width, canvas.height] = [view.slots, rows];
  const image = new ImageData(view.slots, rows);
  for (let at = 0; at < view.born.length; at++) {
    const token = view.born[at];
    const seen = token < 0 ? [empty(), empty(), empty()] : colour(token / Math.max(1, view.read - 1));
    image.data.set([...seen, 255], at * 4);
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
  context.clearRect(0, 0, width, height);
  bars.forEach((held, n) => {
    const tall = Math.min(1, held / most) ** 0.5 * height; // the root, so that little is seen
    context.fillStyle = `rgb(${colour(n / width).join()})`;
    context.fillRect(n, height - tall, 1, tall);
  });
}

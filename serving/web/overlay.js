/** Place and content of a heatmap over a photo. */

/** Places a heatmap, which covers the model's square, over a loaded photo; both fill the same box. */
export function place(heat, photograph, resize) {
  const ratio = photograph.naturalWidth / photograph.naturalHeight;
  for (const [side, share] of Object.entries(placeOf(ratio, resize))) heat.style[side] = `${100 * share}%`;
}

/** Position of the model's square on a photo of this width and height, as fractions of its sides. */
function placeOf(ratio, resize) {
  const [width, height] = {
    squash: [1, 1],
    crop: [Math.min(1, 1 / ratio), Math.min(1, ratio)],
    pad: [Math.max(1, 1 / ratio), Math.max(1, ratio)],
  }[resize];
  return { width, height, left: (1 - width) / 2, top: (1 - height) / 2 };
}

/** Whether a loaded heatmap has no heat. */
export function isBlank(heat) {
  const canvas = new OffscreenCanvas(heat.naturalWidth, heat.naturalHeight);
  const context = canvas.getContext("2d");
  context.drawImage(heat, 0, 0);
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  return data.every((value, index) => index % 4 !== 3 || value === 0);
}

"""Layer of overlapping stamps, such as flakes, and its place on a scene."""

from __future__ import annotations

import numpy as np

from scalp_core.synthetic.textures import HEIGHT, WIDTH, Array, Stamp


class Layer:
    """Layer of overlapping stamps: `alpha`, and `light` premultiplied by it; float32 (480, 640) each."""

    def __init__(self) -> None:
        self.alpha, self.light = np.zeros((2, HEIGHT, WIDTH), np.float32)

    def add(self, stamp: Stamp, place: Array, opacity: float) -> float:
        """Add a stamp centered at `place`, x and y; returns the increase of the cover, in pixels."""
        side = len(stamp.alpha)
        left, top = place.astype(int) - side // 2
        rows = slice(max(top, 0), max(top + side, 0))
        columns = slice(max(left, 0), max(left + side, 0))
        under, shine = self.alpha[rows, columns], self.light[rows, columns]
        height, width = under.shape
        inner = np.s_[max(-top, 0) :, max(-left, 0) :]
        alpha = stamp.alpha[inner][:height, :width] * np.float32(opacity)
        shine += alpha * (stamp.light[inner][:height, :width] - shine)
        grown = alpha * (1 - under)
        under += grown
        return float(grown.sum())


def lay_flakes(planes: Array, layer: Layer, color: Array, light_angle: float) -> None:
    """Lay flakes of a color (R, G, B) and their shadows on planes, float32 (3, 480, 640), in place."""
    dx, dy = round(2 * np.cos(light_angle)), round(2 * np.sin(light_angle))
    shadow = np.zeros_like(layer.alpha)
    shadow[2:-2, 2:-2] = layer.alpha[2 - dy : HEIGHT - 2 - dy, 2 - dx : WIDTH - 2 - dx]
    planes *= (1 - layer.alpha) * (1 - 0.28 * shadow)
    planes += layer.light * color.astype(np.float32)[:, None, None]

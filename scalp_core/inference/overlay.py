"""Heatmaps as pictures: their colors, a photograph under its heat. Without PyTorch, which takes seconds."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from PIL import Image

MEANING = "where the model looked, not where the lesion is"


@cache
def heat_colors() -> np.ndarray:
    """matplotlib's viridis: uint8 (256, 3), from no heat to the most.

    Its steps look equal, and it has greens, which skin has not: over skin, inferno's reds look like redness.
    """
    import matplotlib  # takes a second: only where pictures are made

    return (matplotlib.colormaps["viridis"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def overlay(image: np.ndarray, heatmap: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """The photograph under its heat. Where there is no heat it stays as it is.

    Args:
        image: uint8 (S, S, 3).
        heatmap: (S, S) in 0..1.
        opacity: of the color where the heat is 1; 0..1.

    Returns:
        uint8 (S, S, 3).
    """
    colors = heat_colors()[np.rint(heatmap * 255).astype(np.uint8)]
    share = (opacity * heatmap)[..., None]
    return np.rint(image * (1 - share) + colors * share).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as a PNG file, without any metadata."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()

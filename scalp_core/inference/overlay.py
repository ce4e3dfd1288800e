"""Heatmap overlays: colors, and the blend with the image. Does not import PyTorch, which takes seconds."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from PIL import Image

MEANING = "where the model looked, not where the lesion is"


@cache
def heat_colors() -> np.ndarray:
    """Return the colors of matplotlib's viridis: uint8 (256, 3), from no heat to the most.

    Its steps look equal, and its greens do not occur in skin; over skin, inferno's reds look like redness.
    """
    import matplotlib  # takes a second to import: only if heatmaps are drawn

    return (matplotlib.colormaps["viridis"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def overlay(image: np.ndarray, heatmap: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """Blend a heatmap over an image; pixels without heat stay unchanged.

    Args:
        image: uint8 (S, S, 3).
        heatmap: float (S, S) in 0..1.
        opacity: Opacity of the color at heat 1, 0..1.

    Returns:
        uint8 (S, S, 3).
    """
    colors = heat_colors()[np.rint(heatmap * 255).astype(np.uint8)]
    alpha = (opacity * heatmap)[..., None]
    return np.rint(image * (1 - alpha) + colors * alpha).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """Encode pixels, uint8 (H, W, 3) or (H, W, 4), as a PNG file without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def transparent_png(heatmap: np.ndarray) -> bytes:
    """Encode a heatmap, float (S, S) in 0..1, as an RGBA PNG file with the heat as opacity."""
    levels = np.rint(heatmap * 255).astype(np.uint8)
    return png(np.concatenate([heat_colors()[levels], levels[..., None]], axis=-1))

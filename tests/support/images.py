"""Images that tests draw."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def jpeg(seed: int = 0, size: tuple[int, int] = (640, 480), **options: object) -> bytes:
    """Encode a JPEG with smooth colors, so that decoders and resizers behave as on real images."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(60, 220, (12, 16, 3)).astype(np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=88, **options)
    return buffer.getvalue()

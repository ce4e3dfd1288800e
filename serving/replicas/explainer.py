"""Explainer deployment: heatmaps, separate from the grader so that no batch waits."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from scalp_core.bundles.loading import load_bundle
from scalp_core.errors import UserError
from scalp_core.inference import explainer, heatmaps, overlay

# During a change of the bundle, images that the previous one graded are still explained by it.
_KEPT = 2


class ExplainerSettings(BaseModel):
    """The `user_config` of the explainer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: str | None = Field(
        None, description="loaded before the first request; heatmaps are always of the bundle that graded"
    )


class Explainer:
    """Explain a grade with the bundle that gave it; load each bundle once, evict the least recent."""

    def __init__(self) -> None:
        self._loading = threading.Lock()
        self._load = lru_cache(maxsize=_KEPT)(_load)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply `ExplainerSettings`; an architecture without heatmaps is reported by the first request."""
        settings = ExplainerSettings.model_validate(user_config)
        if settings.bundle:
            with suppress(UserError):
                await asyncio.to_thread(self._explainer, settings.bundle)

    async def heatmap(self, image: np.ndarray, grade: int, bundle: str) -> bytes:
        """Compute which parts of an image spoke for a grade.

        Args:
            image: uint8 (size, size, 3) from `preprocess.decode`.
            bundle: Directory of the bundle that graded the image.

        Returns:
            An RGBA PNG file of the same size: viridis colors, opaque where the heat is highest.

        Raises:
            UserError: The architecture of the bundle has no feature map.
        """
        return await asyncio.to_thread(
            lambda: overlay.transparent_png(self._explainer(bundle).heatmap(image, grade))
        )

    def _explainer(self, bundle: str) -> heatmaps.Explainer:
        with self._loading:  # concurrent requests load a bundle once
            return self._load(bundle)


def _load(bundle: str) -> heatmaps.Explainer:
    return explainer.make_explainer(load_bundle(bundle), "cpu")

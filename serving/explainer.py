"""The replica that makes heatmaps: Grad-CAM by PyTorch, beside the grader so that no batch waits for it."""

from __future__ import annotations

import asyncio
import io
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from scalp_core import heat
from scalp_core.bundle import load_bundle
from scalp_core.errors import UserError

if TYPE_CHECKING:
    from scalp_core import explain  # PyTorch: only in the replica, not where the deployment is described

# While a new bundle comes in, photographs graded by the one before it are still explained by that one.
_KEPT = 2


class ExplainerSettings(BaseModel):
    """The `user_config` of the explainer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: str | None = Field(
        None, description="loaded before the first request; heatmaps are always of the bundle that graded"
    )


class Explainer:
    """Explains a grade with the bundle that gave it, which is loaded when it is first asked for."""

    def __init__(self) -> None:
        self._explainers: OrderedDict[str, explain.Explainer] = OrderedDict()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Applies `ExplainerSettings`; an architecture without heatmaps is told when one is asked for."""
        settings = ExplainerSettings.model_validate(user_config)
        if settings.bundle:
            await asyncio.to_thread(self._prepare, settings.bundle)

    def _prepare(self, bundle: str) -> None:
        try:
            self._explainer(bundle)
        except UserError:
            return

    async def heatmap(self, image: np.ndarray, grade: int, bundle: str) -> bytes:
        """What spoke for a grade, as a picture to lay over the photograph.

        Args:
            image: uint8 (size, size, 3) from `preprocess.decode`.
            grade: to explain.
            bundle: where the bundle is that graded it.

        Returns:
            an RGBA PNG file of the same size: viridis colours, opaque where the heat is most.

        Raises:
            UserError: the bundle's architecture has no map of the picture.
        """
        return await asyncio.to_thread(self._heatmap, image, grade, bundle)

    def _heatmap(self, image: np.ndarray, grade: int, bundle: str) -> bytes:
        return layer(self._explainer(bundle).heatmap(image, grade))

    def _explainer(self, bundle: str) -> explain.Explainer:
        if bundle not in self._explainers:
            from scalp_core import explain

            self._explainers[bundle] = explain.Explainer(load_bundle(bundle), "cpu")
            while len(self._explainers) > _KEPT:
                self._explainers.popitem(last=False)
        return self._explainers[bundle]


def layer(heatmap: np.ndarray) -> bytes:
    """float (S, S) in 0..1 as an RGBA PNG file, whose opacity is the heat."""
    levels = np.rint(heatmap * 255).astype(np.uint8)
    pixels = np.concatenate([heat.heat_colours()[levels], levels[..., None]], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "PNG")
    return buffer.getvalue()

"""Load a bundle by its directory or by its name in the model registry."""

from __future__ import annotations

from scalp_core.bundles.bundle import Bundle, open_bundle
from scalp_core.bundles.registry import resolve


def load_bundle(uri: str) -> Bundle:
    """Open a bundle or a run directory, local or `s3://`, or `models://NAME[@VERSION]` of the registry.

    Raises:
        UserError: As in `open_bundle`, or the registry has no such version.
    """
    return open_bundle(resolve(uri))

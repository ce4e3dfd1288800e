"""Load a bundle by its directory or by its name in the model registry."""

from __future__ import annotations

from scalp_core.bundles.bundle import Bundle, open_bundle
from scalp_core.bundles.registry import resolve


def load_bundle(uri: str) -> Bundle:
    """Load a bundle, or a run's directory that holds one; its large files are read when they are used.

    Args:
        uri: local, `s3://`, or `models://NAME[@VERSION]` of the registry.

    Raises:
        UserError: it is missing, damaged, changed, or of a schema this version does not know.
    """
    return open_bundle(resolve(uri))

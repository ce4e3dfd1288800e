"""Load a bundle by its directory or by its name in the model registry."""

from __future__ import annotations

from scalp_core.bundles.bundle import Bundle, open_bundle
from scalp_core.bundles.registry import resolve


def load_bundle(uri: str) -> Bundle:
    """Load a bundle, or a run directory that holds one; large files are read at their first use.

    Args:
        uri: Directory, local or `s3://`, or `models://NAME[@VERSION]` of the registry.

    Raises:
        UserError: The bundle is missing, damaged, changed, or has an unsupported schema version.
    """
    return open_bundle(resolve(uri))

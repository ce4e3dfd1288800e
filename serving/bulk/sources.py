"""Check that a source of `POST /v1/bulk` is below the prefixes of the operator and of the caller's key."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scalp_core import storage
from scalp_core.datasets import scan
from serving.auth.scopes import BULK, Rights, canonical_uri, is_below
from serving.http.problems import Refusal, forbidden


def allowed_source(source: str, prefixes: Sequence[str], rights: Rights) -> str:
    """Check a source and return its canonical form.

    The scope is checked first and refusals list no prefixes, so that a key reveals nothing about other keys.

    Raises:
        Refusal: It is outside of the prefixes, also through a link, or it is a table of images (403).
    """
    try:
        canonical = canonical_uri(source)
    except ValueError as error:
        raise _refused(str(error)) from None
    if not rights.admin and not _is_within(canonical, rights.bulk):
        raise forbidden(f"{BULK}:{canonical}")
    if not any(is_below(canonical, prefix) for prefix in prefixes):
        raise _refused("it is outside of the prefixes that the operator allows")
    if scan.is_table(canonical):
        raise _refused("a table may list images anywhere")
    if not _is_within(canonical, prefixes):
        raise _refused("a link in its path leads outside of the prefixes")
    return canonical


def _is_within(canonical: str, prefixes: Sequence[str]) -> bool:
    """Whether a canonical source is below one of the prefixes, also after its links are resolved."""
    allowed = [prefix for prefix in prefixes if is_below(canonical, prefix)]
    if storage.is_s3(canonical):
        return bool(allowed)
    real = Path(canonical).resolve() if allowed else None
    return any(real.is_relative_to(Path(prefix).resolve()) for prefix in allowed if real)


def _refused(why: str) -> Refusal:
    return Refusal(403, "source_not_allowed", f"{why}; the operator names the prefixes with --bulk-source")

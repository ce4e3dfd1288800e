"""Which sources `POST /v1/bulk` takes: those below the prefixes of the operator and of the caller's key."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scalp_core import storage
from scalp_core.datasets import scan
from serving.auth.prefixes import canonical_uri, is_below
from serving.auth.scopes import BULK, Rights
from serving.http.problems import Refusal, forbidden


def allowed_source(source: str, prefixes: Sequence[str], rights: Rights) -> str:
    """The source as it is graded.

    The scope is checked first, and no refusal lists a prefix: a key learns nothing of those of others.

    Args:
        source: as the client wrote it.
        prefixes: plain ones, of the operator.
        rights: of the caller.

    Raises:
        Refusal: it is elsewhere, a link leads elsewhere, or it names images that may be anywhere.
    """
    try:
        plain = canonical_uri(source)
    except ValueError as error:
        raise _refused(str(error)) from None
    if not rights.admin and not _is_within(plain, rights.bulk):
        raise forbidden(f"{BULK}:{plain}")
    if not any(is_below(plain, prefix) for prefix in prefixes):
        raise _refused("it is below no prefix that the operator allows")
    if scan.is_table(plain):
        raise _refused("a table names images that may be anywhere")
    if not _is_within(plain, prefixes):
        raise _refused("a link in it leads elsewhere")
    return plain


def _is_within(plain: str, prefixes: Sequence[str]) -> bool:
    """Whether a plain source is below one of the prefixes, also after the links of a path are resolved."""
    allowed = [prefix for prefix in prefixes if is_below(plain, prefix)]
    if storage.is_s3(plain):
        return bool(allowed)
    real = Path(plain).resolve() if allowed else None
    return any(real.is_relative_to(Path(prefix).resolve()) for prefix in allowed if real)


def _refused(why: str) -> Refusal:
    return Refusal(403, "source_not_allowed", f"{why}; the operator names the prefixes with --bulk-source")

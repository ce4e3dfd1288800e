"""`scalp grade --plan`: count images, estimate time, requests and cost, and grade nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jobs.common.console import progress_bar, show
from jobs.common.inference import ModelOptions
from jobs.grade.files import Listed
from jobs.grade.identity import open_run
from jobs.grade.listing import find_roots, select_images
from scalp_core import storage
from scalp_core.datasets import scan
from scalp_core.datasets.scan import Root
from scalp_core.results.documents import Document, plan_documents
from scalp_core.results.progress import read_progress

_LISTING_THREADS = 16
_KEYS_PER_LISTING = 1000
# Requests to S3, as docs/scale.md counts them.
_PER_IMAGE, _PER_SHARD = 2, 4
_IMAGES_PER_SHARD = 128


def estimate(
    bundle: str,
    sources: Sequence[str],
    out: str,
    model: ModelOptions,
    rate: float | None = None,
    price: float | None = None,
    tables: bool = True,
    links: bool = True,
    documents: Sequence[Document] = (),
) -> dict[str, Any]:
    """Count what a run would grade, and print the estimate.

    Args:
        bundle: Bundle of the run.
        sources: Sources of the run.
        out: Its output directory; an earlier session there gives the rate and the images that are done.
        model: Options of inference of the run.
        rate: Images per second of all machines; default: that of the last session in `out`.
        price: Price of all machines per hour.
        tables: As for `find_roots`; so is `links`.
        documents: Kinds of clinical documents of the run; they are checked, not estimated.

    Returns:
        `images, tars, other_files, bytes, done, rate, hours, requests, cost`; None where unknown.

    Raises:
        UserError: A source is missing or unreadable, or the run would refuse the bundle, `out` or documents.
    """
    named = [storage.absolute(source) for source in sources]
    _, _, loaded = open_run(bundle, named, storage.absolute(out), model)
    plan_documents(storage.absolute(out), documents, loaded.spec.symptom)
    total: Counter[str] = Counter()
    roots = find_roots(named, tables, links)
    with ThreadPoolExecutor(_LISTING_THREADS) as pool, progress_bar("listing", None) as (progress, bar):
        for counted in pool.map(_count_root, roots):
            total.update(counted)
            progress.update(bar, advance=counted["images"])
    session = read_progress(out)
    if rate is None and session:
        rate = session.photographs_per_second
    done = session.done if session else 0
    hours = max(0, total["images"] - done) / rate / 3600 if rate else None
    found = {
        **{name: total[name] for name in ("images", "tars", "other_files", "bytes")},
        "done": done,
        "rate": rate,
        "hours": hours,
        "requests": total["requests"]
        + storage.is_s3(out) * _PER_SHARD * total["images"] // _IMAGES_PER_SHARD,
        "cost": hours * price if hours is not None and price is not None else None,
    }
    _show(found)
    return found


def _count_root(root: Root) -> Counter[str]:
    """Count the images in a piece of a source, their bytes, and the requests to list and read them."""
    found, listed = Counter[str](), Listed("")
    tars: list[dict[str, Any]] = []
    for row in select_images(scan.list_root(root), listed, tars):
        found.update(images=1, bytes=row.get("bytes") or 0, requests=_PER_IMAGE * storage.is_s3(row["uri"]))
    found.update(tars=len(tars), other_files=listed.other_files, bytes=sum(row["bytes"] or 0 for row in tars))
    if storage.is_s3(root.uri):
        found["requests"] += -(-(found["images"] + listed.other_files) // _KEYS_PER_LISTING)
    return found


def _show(found: dict[str, Any]) -> None:
    rows = {
        "images": f"{found['images']:,}"
        + (f" and those in {found['tars']:,} tar{'s' * (found['tars'] != 1)}" if found["tars"] else ""),
        "done": f"{found['done']:,}",
        "other files": f"{found['other_files']:,}",
        "size": f"{found['bytes'] / 1e9:.3f} GB",
        "requests to S3": f"about {found['requests']:,}",
        "time": "unknown; give --rate, or stop a run in OUT after some minutes"
        if found["hours"] is None
        else f"{_duration(found['hours'])} at {found['rate']:.1f} images/s, without start-up",
    }
    show("plan", rows | ({"cost": f"{found['cost']:,.2f}"} if found["cost"] is not None else {}))


def _duration(hours: float) -> str:
    return f"{60 * hours:.1f} minutes" if hours < 1 else f"{hours:,.1f} hours"

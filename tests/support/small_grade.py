"""Small run of `scalp grade` in this process with a stub model, for crash tests.

Imports neither PyTorch nor pytest, so that processes fork quickly.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any
from unittest.mock import patch

import numpy as np
import simplejpeg

from jobs.common import provenance
from jobs.common.console import console
from jobs.common.inference import ModelOptions
from jobs.common.local_executor import LocalExecutor
from jobs.grade import report as grade_report
from jobs.grade.driver import GradeOptions, grade
from jobs.grade.planning import PoolOptions
from scalp_core import storage
from scalp_core.bundles.bundle import save_bundle, sha256
from scalp_core.bundles.contract import WEIGHTS_FILE, BundleSpec, Conformal, InitialWeights, Training
from scalp_core.images.preprocess import Preprocess
from scalp_core.results.documents import Document
from scalp_core.results.progress import REPORT_FILE
from scalp_core.results.schema import RESULTS_FOLDER
from tests.support.result_rows import read_results

SIDE = 32
SHARD = 3
IMAGES = 10


class StubModel:
    """Model without weights whose output depends on the image."""

    def logits(self, images: np.ndarray) -> np.ndarray:
        return images[:, 0, :4, 0].astype(np.float32) / 64


def make_stub(*_: Any) -> StubModel:
    return StubModel()


def picture(seed: int, side: int = SIDE) -> bytes:
    """Make a small JPEG."""
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return simplejpeg.encode_jpeg(pixels, 60)


NEWER = picture(6)


def tarred(members: Sequence[tuple[str, bytes]]) -> bytes:
    """Make a plain tar; names may repeat."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zipped(members: Sequence[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def write_bundle(uri: str, **changes: Any) -> str:
    """Write a bundle with invalid weights."""
    weights = b"weights"
    spec = BundleSpec(
        name="stub",
        created_at=datetime.now(UTC),
        architecture="stub",
        preprocess=Preprocess(size=SIDE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        temperature=1.5,
        conformal=Conformal(coverage=0.9, quantile=0.8),
        training=Training(
            recipe={}, initial_weights=InitialWeights(source="none"),
            workers=1, best_epoch=1, data_sha256="0" * 64,
            grade_counts=[1, 5, 7, 3],
        ),
        metrics={},
        versions=provenance.versions(),
        git_revision=None,
        weights_sha256=sha256(weights),
    )  # fmt: skip
    save_bundle(uri, spec.model_copy(update=changes), {WEIGHTS_FILE: weights})
    return uri


def sources(root: str) -> list[str]:
    """Write a folder with a zip, a tar with a repeated name, an empty image, and a table with a repeat."""
    folder, table = f"{root}/source", f"{root}/table.csv"
    files = {
        f"{folder}/a.jpg": picture(0),
        f"{folder}/b.jpg": picture(1),
        f"{folder}/bad.jpg": b"",
        f"{folder}/note.txt": b"no image",
        f"{folder}/a.zip": zipped([("z1.jpg", picture(2)), ("z2.jpg", picture(3))]),
        f"{folder}/a.tar": tarred(
            [("t1.jpg", picture(4)), ("t2.jpg", picture(5)), ("t1.jpg", NEWER), ("t3.jpg", picture(7))]
        ),
        f"{root}/more/x.jpg": picture(8),
        f"{root}/more/y.jpg": picture(9),
        table: b"uri\nmore/x.jpg\nmore/y.jpg\nmore/x.jpg\n",
    }
    for uri, data in files.items():
        storage.write(uri, data)
    return [folder, table]


def run(
    bundle: str,
    named: Sequence[str],
    out: str,
    retry: bool = False,
    report: bool = True,
    model: ModelOptions | None = None,
    links: bool = True,
    documents: Sequence[Document] = (),
) -> dict[str, Any]:
    """Run `scalp grade` in this process, without Ray; `report=False` replaces the report by a word."""
    options = GradeOptions(
        model or ModelOptions(device="cpu", precision="fp32"),
        PoolOptions(shard_size=SHARD, fetches=1),
        max_failed_share=1,
        retry_failed=retry,
        heatmaps=0,
        links=links,
        documents=documents,
    )
    with ExitStack() as patches:
        if not report:
            patches.enter_context(patch.object(console, "quiet", True))
            patches.enter_context(patch.object(grade_report, "write_report", _write_word))
        return grade(bundle, list(named), out, options, make_stub, LocalExecutor())


def _write_word(out: str, *_: Any) -> None:
    storage.write(storage.join(out, REPORT_FILE), b"a report")


def rows(out: str) -> list[dict[str, Any]]:
    """Result rows."""
    return read_results(storage.join(out, RESULTS_FOLDER)).to_pylist()

"""`scalp demo`: run the whole pipeline on this machine, on synthetic images, and print one table."""

from __future__ import annotations

import io
import os
import socket
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from rich.text import Text

from jobs.common import provenance
from jobs.common.console import SUMMARY_FILE, console, now, show, write_json
from jobs.data.prepare import prepare
from jobs.data.synth import synth
from jobs.demo_s3 import s3_server
from jobs.evaluate.driver import default_executor, evaluate
from jobs.grade.driver import grade
from jobs.train.driver import RECIPES, train
from scalp_core import storage
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.models.offline_weights import read_offline_weights
from scalp_core.models.recipe import load_recipe
from scalp_core.results.query import ResultRows
from scalp_core.storage import outputs
from scalp_core.synthetic.plan import SynthOptions
from serving import app

KIND = "demo"
_RECIPE = "cpu"
# The few validation images of the demo cannot prove a target: each image would be referred.
_CHANGES = ["referral=none", "epochs=5"]
_GRADED_IMAGES = 96
_CLIENTS = 8
_HOST = "127.0.0.1"
_TOLERANCE = 1e-5

# Added to each upload: each must become a failed row with its error.
_BAD_FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty.jpg": lambda _: b"",
    "text.jpg": lambda _: b"this is a text, not an image\n",
    "truncated.jpg": lambda good: good[: len(good) // 2],
}


class _Steps:
    """Run the steps, and record the seconds of each."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.started = time.monotonic()

    def run(self, name: str, step: Callable[[], Any]) -> Any:
        console.rule(Text(name, "bold"), align="left")
        started = time.monotonic()
        result = step()
        self.rows.append({"step": name, "seconds": round(time.monotonic() - started, 1)})
        return result


def demo(out: str, images: int) -> dict[str, Any]:
    """Generate images, train, evaluate, grade in S3, serve, and compare online with bulk answers.

    Args:
        out: Output folder, local; a stopped demo resumes.
        images: Number of synthetic images.

    Returns:
        The summary, also written to `out/summary.json`.

    Raises:
        UserError: `out` holds something else or is in use, an answer differs between online and bulk, or an
            image has no row.
    """
    root = storage.local_folder(out, "--out")
    with outputs.open_output(str(root), KIND):
        return _demo(root, images)


def _demo(root: Path, images: int) -> dict[str, Any]:
    steps = _Steps()
    recipe = load_recipe(_RECIPE, RECIPES, _CHANGES)
    read_offline_weights(recipe.architecture)  # before minutes of work
    images_folder, data, run = str(root / "images"), str(root / "data"), str(root / "run")
    steps.run("synthetic images", lambda: synth(images_folder, SynthOptions(images=images)))
    # Before Ray starts: its workers inherit the credentials from the environment.
    with s3_server(root / "s3") as server:
        os.environ.update(server.environment)
        executor = default_executor()
        steps.run("prepare", lambda: prepare(images_folder, data, executor=executor))
        steps.run("train", lambda: train(data, run, recipe))
        evaluation = str(root / "evaluation")
        scored = steps.run(
            "evaluate", lambda: evaluate(run, data, evaluation, executor=executor, probe=False)
        )
        prefix = f"s3://{server.bucket}/images"
        archive = f"s3://{server.bucket}/images.zip"
        files = steps.run("upload to S3", lambda: _upload(data, prefix, archive))
        in_zip, in_prefix = (
            steps.run(step, lambda: grade(run, source, str(root / folder), executor=executor))  # noqa: B023
            for step, source, folder in (
                ("grade a zip in S3", archive, "graded_zip"),
                ("grade an S3 prefix", prefix, "graded_prefix"),
            )
        )
        online = steps.run("serve and ask", lambda: _ask(run, files))
    equal = all(_equal(online, str(root / folder)) for folder in ("graded_zip", "graded_prefix"))
    summary = {
        "kind": "demo",
        "date": now(),
        "git_revision": provenance.git_revision(),
        "machine": provenance.machine(),
        "versions": provenance.versions(),
        "settings": {"images": images, "recipe": recipe.model_dump()},
        "rows": steps.rows,
        "ratios": {
            "qwk": scored["metrics"]["qwk"],
            "top1": scored["metrics"]["top1"],
            "majority_top1": scored["majority"]["top1"],
            "online_equals_bulk": equal,
            "rows_unaccounted": in_zip["rows_unaccounted"] + in_prefix["rows_unaccounted"],
            "seconds": round(time.monotonic() - steps.started, 1),
        },
    }
    write_json(str(root / SUMMARY_FILE), summary)
    _show(summary, scored, [in_zip, in_prefix], root)
    if not equal:
        raise UserError(f"online and bulk answers differ; see {root}/graded_zip and {root}/graded_prefix")
    return summary


def _upload(data: str, prefix: str, archive: str) -> dict[str, bytes]:
    """Upload test images and bad files to S3, one by one and as a zip; return them by name."""
    rows = manifest.select_split(manifest.read_manifest(data), "test").slice(0, _GRADED_IMAGES)
    files = {Path(uri).name: Path(uri).read_bytes() for uri in rows["uri"].to_pylist()}
    good = next(iter(files.values()))
    files |= {name: spoil(good) for name, spoil in _BAD_FILES.items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for name, content in files.items():
            # A constant date: a repeated demo uploads the same archive.
            zipped.writestr(zipfile.ZipInfo(name), content)
    storage.write(archive, buffer.getvalue())
    with ThreadPoolExecutor(_CLIENTS) as pool:
        list(pool.map(lambda item: storage.write(f"{prefix}/{item[0]}", item[1]), files.items()))
    console.print(f"{len(files)} files, {len(_BAD_FILES)} of them bad, under {prefix}/ and in {archive}")
    return files


def _ask(run: str, files: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    """Answers of the endpoint by file name: gradings, or problems of files that cannot be graded."""
    port = _free_port()
    app.start(run, _HOST, port)  # ends with this process, like the local Ray
    with httpx.Client(base_url=f"http://{_HOST}:{port}", timeout=60) as client:

        def ask(content: bytes) -> dict[str, Any]:
            return client.post("/v1/grade", files={"file": ("image.jpg", content)}).json()

        started = time.monotonic()
        with ThreadPoolExecutor(_CLIENTS) as pool:
            answers = dict(zip(files, pool.map(ask, files.values()), strict=True))
        seconds = time.monotonic() - started
    console.print(f"{len(answers)} requests answered in {seconds:.1f} s from {_CLIENTS} clients")
    return answers


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return probe.getsockname()[1]


def _equal(online: dict[str, dict[str, Any]], graded: str) -> bool:
    """Whether grades and probabilities, or error codes, are equal for all files."""
    with ResultRows(graded) as bulk:
        rows = bulk.select_rows().read_all().to_pylist()
    if len(rows) != len(online):
        return False
    for row in rows:
        answer = online[(row["member"] or row["uri"]).rsplit("/", 1)[-1]]
        if row["status"] == "failed":
            if answer.get("code") != row["error_code"]:
                return False
            continue
        pairs = zip(row["probabilities"], answer["probabilities"], strict=True)
        if row["grade"] != answer["grade"] or any(abs(a - b) > _TOLERANCE for a, b in pairs):
            return False
    return True


def _sum(summaries: list[dict[str, Any]], name: str) -> int:
    return sum(summary[name] for summary in summaries)


def _show(summary: dict[str, Any], scored: dict[str, Any], graded: list[dict[str, Any]], root: Path) -> None:
    ratios = summary["ratios"]
    bounds = scored["intervals"]["qwk"]
    seconds = {row["step"]: f"{row['seconds']} s" for row in summary["rows"]}
    console.rule(Text("results", "bold"), align="left")
    show(
        "demo",
        {
            "test images": f"{scored['metrics']['n']}, from {scored['groups']} microscopes never trained on",
            "quadratic weighted kappa": ratios["qwk"],
            "  95 % interval by microscopes": f"{bounds['low']:.3f} to {bounds['high']:.3f}"
            if bounds
            else "none",
            "top-1 accuracy": ratios["top1"],
            "  always the majority grade": ratios["majority_top1"],
            "graded in S3": f"{_sum(graded, 'graded')} of {_sum(graded, 'rows')} files",
            "  failed, with reasons": graded[0]["by_error"],
            "  unaccounted": ratios["rows_unaccounted"],
            "online equals bulk": "yes" if ratios["online_equals_bulk"] else "NO",
            "seconds": ratios["seconds"],
            "  of which": seconds,
            "report on the data": root / "data" / "report.html",
            "training curves": root / "run" / "curves.png",
            "pictures of the evaluation": root / "evaluation",
            "summary": root / SUMMARY_FILE,
        },
    )

"""Synthetic scalp photographs in the layout of AI Hub set 216, for tests, demos and benchmarks.

The real photographs may not be passed on. These stand in for them with the same names, folders, label and
meta files, imbalance, several photographs of a person, many microscopes and imperfect graders. They say
nothing about how well a model grades real scalps.

A person has a latent severity; a photograph adds what its place on the head adds. Both the true grade and
the label are cut from that latent, the label after the grader's error. Shares of grades are exact for any
number of photographs, because the cut is made by rank.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from joblib import cpu_count
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES
from scalp_core.storage import lease, outputs
from scalp_core.synthetic.layouts import (
    LAYOUTS,
    Layout,
    as_json,
    label_file,
    meta_file,
    normalized,
    pack,
    paths,
)
from scalp_core.synthetic.plan import PARTS, PhotoPlan, SynthOptions, plan_dataset
from scalp_core.synthetic.scene import render_photo

# Changes whenever the same options would give other files, so that a half-filled folder is never mixed.
RENDERER = 1

_SUMMARY = "synth.json"
_MARKER = "synth.started.json"
# Of the output directory that the set is drawn into.
_NOT_OF_THE_SET = {outputs.MARKER_FILE, lease.FOLDER}


class SynthSummary(BaseModel):
    """What a folder of synthetic photographs holds; its `synth.json`."""

    renderer: int = Field(description="version of the renderer that drew them")
    options: SynthOptions
    images: int
    people: int
    devices: int
    grades: dict[str, int] = Field(description="photographs by label, the whole set")
    parts: dict[str, dict[str, int]] = Field(description="photographs by part and label")
    by_device: dict[str, int] = Field(description="photographs by site and device")


# --- files -------------------------------------------------------------------------------------------------


def write_photo(
    plan: PhotoPlan,
    out: Path,
    layout: Layout = LAYOUTS["delivered"],
    every_symptom: bool = False,
    picture: bytes | None = None,
) -> Path:
    """Writes a photograph, its label and its meta file below `out`, unless all are there.

    Each file appears whole or not at all. The photograph comes last, so where it is, the others are.

    Args:
        plan: of the photograph.
        out: folder of the set.
        layout: of its folders.
        every_symptom: copies under every symptom that it has, as in the real set.
        picture: its JPEG; drawn if not given.

    Returns:
        Path of the photograph.
    """
    files = [(kind, out / normalized(path, layout)) for kind, path in paths(plan, layout, every_symptom)]
    photograph = files[-1][1]
    if photograph.exists():
        return photograph
    picture = picture or jpeg(plan)
    for kind, path in files:
        if kind == "photograph":
            _write(path, picture)
        else:
            _write(path, label_file(plan, layout) if kind == "label" else meta_file(plan))
    return photograph


def jpeg(plan: PhotoPlan) -> bytes:
    """Draws a photograph; 640x480, as the microscopes save it."""
    rng = np.random.default_rng([plan.seed, 1, plan.index])
    pixels = render_photo(plan.severity, plan.device, rng, plan.scalp)
    quality = int(np.clip(plan.device.quality + rng.integers(-5, 6), 50, 95))
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=quality, subsampling=plan.device.subsampling)
    return data.getvalue()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # One fixed name, so that what an interrupted run left is overwritten and not left behind.
    partial_file = path.with_name(f".{path.name}.part")
    partial_file.write_bytes(data)
    partial_file.replace(path)


# --- the whole set -----------------------------------------------------------------------------------------


def write_dataset(
    out: Path,
    options: SynthOptions,
    workers: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> SynthSummary:
    """Writes the whole set. Safe to run again: a finished one is left as it is, an interrupted one goes on.

    Args:
        out: folder to fill; made if missing.
        options: what to draw.
        workers: processes; by default one for each CPU.
        on_progress: called with the number of photographs written so far.

    Raises:
        UserError: `out` is a file, or holds something else than these options began.
    """
    plans = plan_dataset(options)
    summary = _summarize(plans, options)
    if _claim(out, summary):
        return summary
    write = partial(write_photo, out=out, layout=LAYOUTS[options.layout], every_symptom=options.every_symptom)
    for done, _ in enumerate(_render_all(plans, write, workers or cpu_count()), 1):
        if on_progress:
            on_progress(done)
    pack(out, LAYOUTS[options.layout])
    _write(out / _SUMMARY, as_json(summary.model_dump(mode="json")))
    (out / _MARKER).unlink()
    return summary


def _render_all(plans: list[PhotoPlan], write: Callable[[PhotoPlan], Path], workers: int) -> Iterator[Path]:
    workers = min(workers, 1 + len(plans) // 16)  # starting a process costs as much as 16 photographs
    if workers == 1:
        yield from map(write, plans)
        return
    # spawn: a fork of a process that runs threads (Ray, torch) may hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(write, plans, chunksize=8)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _summarize(plans: list[PhotoPlan], options: SynthOptions) -> SynthSummary:
    def count(chosen: list[PhotoPlan]) -> dict[str, int]:
        counts = Counter(plan.grade for plan in chosen)
        return {str(grade): counts[grade] for grade in range(NUM_GRADES)}

    by_device = Counter(f"{plan.device.site}_{plan.device.serial}" for plan in plans)
    return SynthSummary(
        renderer=RENDERER,
        options=options,
        images=len(plans),
        people=len({plan.stem.rsplit("_", 2)[0] for plan in plans}),
        devices=len(by_device),
        grades=count(plans),
        parts={part: count([plan for plan in plans if plan.part == part]) for part in PARTS},
        by_device=dict(sorted(by_device.items())),
    )


def _claim(out: Path, summary: SynthSummary) -> bool:
    """Marks the folder as these options'; True if it is finished already."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder to write the photographs to")
    if _begun(out / _SUMMARY, summary):
        return True
    if not _begun(out / _MARKER, summary):
        if out.exists() and any(path.name not in _NOT_OF_THE_SET for path in out.iterdir()):
            raise UserError(
                f"{out} is not empty, and not from these options; empty it, name another folder, "
                "or repeat the options that it was begun with"
            )
        _write(out / _MARKER, as_json(summary.model_dump(mode="json")))
    return False


def _begun(path: Path, summary: SynthSummary) -> bool:
    try:
        return SynthSummary.model_validate_json(path.read_bytes()) == summary
    except (OSError, ValidationError):
        return False

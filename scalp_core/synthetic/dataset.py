"""Write synthetic scalp images in a layout of AI Hub set 216, for tests, demos and benchmarks.

The real images may not be redistributed. The synthetic ones have the same names, folders, label and META
files, class imbalance, several images per person, many microscopes and imperfect graders. Metrics on them are
not evidence of how well a model grades real scalps.

A person has a latent severity, to which the position on the head adds a deviation per image. True grade and
label are thresholds of that severity, the label after the grader's error. Thresholds are applied by rank, so
that shares of grades are exact for any number of images.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from joblib import Parallel, cpu_count, delayed
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from scalp_core.datasets.scan import SYNTHETIC_MARK
from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES, SYMPTOM_IDS
from scalp_core.storage import lease, outputs
from scalp_core.synthetic.layouts import as_json, list_files, pack
from scalp_core.synthetic.plan import DELIVERED_PARTS, ImagePlan, LayoutName, SynthOptions, plan_dataset
from scalp_core.synthetic.scene import render_image

# Incremented when the same options give other files, so that a resumed folder holds files of one version.
RENDERER = 2

_SUMMARY = "synth.json"
_MARKER = "synth.started.json"
# Files of scalp in the output directory, which are not part of the set.
_NOT_OF_THE_SET = {outputs.MARKER_FILE, lease.FOLDER}


class SynthSummary(BaseModel):
    """Summary of a folder of synthetic images; its `synth.json`."""

    renderer: int = Field(description="version of the renderer that drew them")
    options: SynthOptions
    images: int
    people: int
    devices: int
    grades: dict[str, int] = Field(description="images by label, in the whole set")
    symptoms: dict[str, dict[str, int]] = Field(
        {},
        exclude_if=lambda counts: not counts,
        description="with all symptoms drawn: images by symptom and label",
    )
    parts: dict[str, dict[str, int]] = Field(description="images by part and label")
    by_device: dict[str, int] = Field(description="images by site and device")


def write_image(
    plan: ImagePlan,
    out: Path,
    layout: LayoutName = "delivered",
    every_symptom: bool = False,
    picture: bytes | None = None,
) -> Path:
    """Write an image, its label and its META file below `out`, unless the image exists; returns its path.

    Writes are atomic. The image is written last, so that its label and META file exist if it does.

    Args:
        plan: Plan of the image.
        out: Folder of the set.
        layout: Layout of the set before it is packed.
        every_symptom: Whether to copy the image under each symptom that it has, as in the real set.
        picture: JPEG of the image; rendered if not given.
    """
    files = list_files(plan, layout, every_symptom)
    image = out / files[-1][0]
    if image.exists():
        return image
    picture = picture or render_jpeg(plan)
    for path, text in files:
        _write(out / path, picture if text is None else text)
    return image


def render_jpeg(plan: ImagePlan) -> bytes:
    """Render a planned image as JPEG of 640x480 pixels, the size of AI Hub's microscopes."""
    rng = np.random.default_rng([plan.seed, 1, plan.index])
    pixels = render_image(plan.severity, plan.device, rng, plan.scalp, plan.others)
    quality = int(np.clip(plan.device.quality + rng.integers(-5, 6), 50, 95))
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=quality, comment=SYNTHETIC_MARK)
    return data.getvalue()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A deterministic name, so that the next run overwrites a leftover of an interrupted one.
    partial_file = path.with_name(f".{path.name}.part")
    partial_file.write_bytes(data)
    partial_file.replace(path)


def write_dataset(
    out: Path,
    options: SynthOptions,
    workers: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> SynthSummary:
    """Write a synthetic set. Idempotent: a finished set is kept, an interrupted one is resumed.

    Args:
        out: Folder of the set; created if missing.
        options: Options of the set.
        workers: Number of processes; default one per CPU.
        on_progress: Called with the number of images written so far.

    Raises:
        UserError: `out` is a file, or holds other files than a set of these options.
    """
    plans = plan_dataset(options)
    summary = _summarize(plans, options)
    if _claim(out, summary):
        return summary
    write = partial(write_image, out=out, layout=options.layout, every_symptom=options.every_symptom)
    # Starting a process takes as long as 16 images.
    workers = min(workers or cpu_count(), 1 + len(plans) // 16)
    rendered = Parallel(workers, return_as="generator")(delayed(write)(plan) for plan in plans)
    for done, _ in enumerate(rendered, 1):
        if on_progress:
            on_progress(done)
    pack(out, options.layout)
    _write(out / _SUMMARY, as_json(summary.model_dump(mode="json")))
    (out / _MARKER).unlink()
    return summary


def _summarize(plans: list[ImagePlan], options: SynthOptions) -> SynthSummary:
    def count(chosen: list[ImagePlan], symptom: int = 0) -> dict[str, int]:
        counts = Counter(plan.symptoms[symptom] for plan in chosen)
        return {str(grade): counts[grade] for grade in range(NUM_GRADES)}

    by_device = Counter(f"{plan.device.site}_{plan.device.serial}" for plan in plans)
    return SynthSummary(
        renderer=RENDERER,
        options=options,
        images=len(plans),
        people=len({plan.stem.rsplit("_", 2)[0] for plan in plans}),
        devices=len(by_device),
        grades=count(plans),
        symptoms={name: count(plans, number) for number, name in enumerate(SYMPTOM_IDS)}
        if options.symptoms == "all"
        else {},
        parts={part: count([plan for plan in plans if plan.part == part]) for part in DELIVERED_PARTS},
        by_device=dict(sorted(by_device.items())),
    )


def _claim(out: Path, summary: SynthSummary) -> bool:
    """Mark the folder with these options; True if the set is already finished."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose a folder for the images")
    if _begun(out / _SUMMARY, summary):
        return True
    if not _begun(out / _MARKER, summary):
        if out.exists() and any(path.name not in _NOT_OF_THE_SET for path in out.iterdir()):
            raise UserError(
                f"{out} is not empty, and not a set of these options; choose another folder, or repeat the "
                "options of the set"
            )
        _write(out / _MARKER, as_json(summary.model_dump(mode="json")))
    return False


def _begun(path: Path, summary: SynthSummary) -> bool:
    try:
        return SynthSummary.model_validate_json(path.read_bytes()) == summary
    except (OSError, ValidationError):
        return False

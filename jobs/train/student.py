"""The student of cross-validated models: it learns from their out-of-fold answers, and costs one model.

The label of a training image is the mean of its grade and of the probabilities from the one model that was
not trained on it. This is distillation (Hinton, Vinyals and Dean 2015) with cross-fitting (Dao, Kamath,
Syrgkanis and Mackey 2021): a teacher that has seen an image repeats its label, also a wrong one. Each teacher
teaches other images, so the student learns what the teachers have in common, as their ensemble answers.

The student trains on the training split, and epoch and calibration are chosen on the validation split, as in
any run. No teacher was trained on the validation split either: what it learned there would reach the student
through its answers, and the student would be too sure of itself. Grade sets and referral rule are fitted on
the out-of-fold answers to all images, unless `list_worse` shows that the student answers worse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.common.executor import Executor
from jobs.common.inference import ModelOptions
from jobs.evaluate.out_of_fold import as_answers, load_answers
from jobs.train.driver import Shared, SoftLabels, train
from jobs.train.tracking import Tracking
from scalp_core import storage
from scalp_core.bundles.bundle import CARD_FILE, INITIAL_FILE, Bundle, save_bundle
from scalp_core.bundles.contract import BundleSpec, Teachers
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.model_card import render_model_card
from scalp_core.inference.out_of_fold import TEACHERS_SHARE, answer, list_worse, mix_labels, with_rules
from scalp_core.inference.predictor import Device
from scalp_core.models.recipe import Recipe

FOLDER = "student"


def train_student(
    data: str,
    run: str,
    recipe: Recipe,
    teachers: Sequence[Bundle],
    answers: pa.Table,
    workers: tuple[int, int] | int | None,
    device: Device,
    tracking: Tracking,
    local: bool,
    progress: Callable[[], None],
) -> dict[str, Any]:
    """Train the student in `run/student`, as `train` does; return the summary of its training.

    Args:
        data: Directory of the data.
        run: Output directory of the folds.
        recipe: Recipe of the folds.
        teachers: Bundles of the folds.
        answers: Out-of-fold answers to the images of train and val, with their `probabilities`.
        workers: As in `train`.
        device: As in `train`.
        tracking: As in `train`.
        local: As in `train`.
        progress: As in `train`.
    """
    record = Teachers(
        models=tuple(bundle.spec.model_version for bundle in teachers),
        share=TEACHERS_SHARE,
        images=answers.num_rows,
        groups=len(set(answers["group"].to_pylist())),
    )
    soft = mix_labels(np.array(answers["label"].to_pylist()), np.array(answers["probabilities"].to_pylist()))
    soft_labels = SoftLabels(record, dict(zip(answers["image_id"].to_pylist(), soft, strict=True)))
    folder = storage.join(run, FOLDER)
    return train(
        data,
        folder,
        recipe,
        workers,
        device,
        None,
        tracking,
        soft_labels=soft_labels,
        shared=Shared(),
        local=local,
        progress=progress,
    )


def make_student_bundle(
    run: str,
    table: pa.Table,
    answers: pa.Table,
    decision: BundleSpec,
    options: ModelOptions,
    executor: Executor | None,
) -> tuple[Bundle, list[str]]:
    """Write `run/bundle`: the student with grade sets and referral rule of all out-of-fold answers.

    Args:
        run: Output directory of the folds, with the student's run.
        table: Manifest.
        answers: Out-of-fold answers.
        decision: Contract with the decision that is fitted on them.
        options: Device of the student.
        executor: Runs the steps; None: `default_executor`.

    Returns:
        The bundle, and the promises that the student keeps worse than the out-of-fold answers do, by their
        rules. If there are any, the rules are those of the validation split.
    """
    folder = storage.join(run, FOLDER)
    student = load_bundle(folder)
    validated = load_answers(folder, table, options, executor)
    places = pc.index_in(validated["image_id"], answers["image_id"].combine_chunks())
    images = as_answers(validated)
    _, by_models = answer(decision, as_answers(answers.take(places)))
    _, by_student = answer(with_rules(student.spec, decision), images)
    worse = list_worse(images.labels, by_models, by_student, images.groups)
    spec = student.spec if worse else _decide_by_teachers(student.spec, decision)
    spec = spec.model_copy(update={"name": Path(run).name, "created_at": datetime.now(UTC)})
    for part in ("weights", "float"):
        student.fetch(part)
    curves = storage.read(storage.join(folder, "curves.png"))
    files = student.files | {CARD_FILE: render_model_card(spec).encode(), "curves.png": curves}
    storage.write(storage.join(run, INITIAL_FILE), storage.read(storage.join(folder, INITIAL_FILE)))
    save_bundle(storage.join(run, "bundle"), spec, files)
    return load_bundle(run), worse


def _decide_by_teachers(spec: BundleSpec, decision: BundleSpec) -> BundleSpec:
    teachers = spec.training.teachers
    if teachers is None:
        raise RuntimeError(f"{spec.name} has no teachers")
    training = spec.training.model_copy(update={"teachers": teachers.model_copy(update={"decide": True})})
    return with_rules(spec, decision).model_copy(update={"training": training})

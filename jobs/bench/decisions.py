"""`scalp bench decisions`: promises of calibration, grade sets and referral, on graders with known truth.

A simulated grader sees a severity with noise and with an offset per microscope. Its probabilities are right
on average over microscopes. Each draw fits a decision on some microscopes, as `scalp train` does, and
measures it on microscopes that were not among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from rich.table import Table
from scipy import special

from jobs.bench.measure import write_result
from jobs.common.console import SUMMARY_FILE, console, progress_bar
from scalp_core import storage
from scalp_core.bundles.contract import BundleSpec, Conformal, InitialWeights, Training
from scalp_core.evaluation.targets import KINDS, Kind, measure_share, parse_targets
from scalp_core.grades import GRADE_NAMES, NUM_GRADES
from scalp_core.images.preprocess import Preprocess
from scalp_core.images.statistics import STATISTICS
from scalp_core.inference.decision import make_gradings
from scalp_core.inference.fitting import fit_decision

KIND = "decisions"

SHARES = np.array([534, 4435, 5486, 2284]) / 12739
"""Shares of the grades in the paper's data."""

_UNSEEN, _IMAGES_EACH = 200, 60  # microscopes per draw that measure, and their images on average
_EVENNESS = 4.0  # of the images per microscope: their standard deviation is half their mean
_POINTS = 0.02


@dataclass(frozen=True)
class Grader:
    """A simulated grader, and the images that its decision is fitted on.

    Args:
        noise: Standard deviation of its noise; that of the severity is 1.
        offset: Standard deviation of the offset of a microscope.
        microscopes: Microscopes of the images that the decision is fitted on.
        images: Number of these images.
        balanced: Whether it learned from equal shares of the grades.
        targets: Targets of its referral rule.
    """

    noise: float
    offset: float
    microscopes: int
    images: int = 1272
    balanced: bool = False
    targets: str = "wrong<=10%, found>=95%"


GRADERS = (
    # As accurate as the paper's notebook: no threshold answers many images with few errors.
    Grader(0.5, 0.0, 40, targets="wrong<=20%, found>=95%"),
    Grader(0.5, 0.3, 40, targets="wrong<=20%, found>=95%"),
    Grader(0.5, 0.3, 40, targets="found>=95%"),
    Grader(0.5, 0.3, 40, balanced=True, targets="found>=95%"),
    Grader(0.25, 0.15, 40),
    Grader(0.12, 0.08, 40),
    Grader(0.12, 0.08, 40, targets="wrong<=5%, found>=95%"),
    # Fewer microscopes or images than a promise needs.
    Grader(0.25, 0.15, 12),
    Grader(0.25, 0.15, 6),
    Grader(0.25, 0.15, 6, 300),
    Grader(0.12, 0.08, 3, 300),
    # Microscopes that differ as much as the images of one.
    Grader(0.5, 0.5, 40, targets="found>=95%"),
    Grader(0.5, 0.5, 12, targets="found>=95%"),
    Grader(0.5, 0.5, 6, targets="found>=95%"),
)

SPEC = BundleSpec(
    name="simulated", created_at=datetime.now(UTC), architecture="simulated", preprocess=Preprocess(),
    temperature=1.0, conformal=Conformal(coverage=0.9), metrics={}, versions={}, git_revision=None,
    weights_sha256="0" * 64,
    training=Training(
        recipe={}, initial_weights=InitialWeights(source="none"), workers=1, best_epoch=1, data_sha256="",
        grade_counts=[1, 1, 1, 1],
    ),
)  # fmt: skip
"""Contract of a simulated grader, before its decision is fitted."""


def bench_decisions(out: str, draws: int = 20, seed: int = 0) -> dict[str, Any]:
    """Measure how often the promises of a decision are kept on new microscopes.

    Args:
        out: Output directory, for `summary.json`.
        draws: Draws of microscopes per grader.
        seed: Random seed.

    Returns:
        The summary.
    """
    rows = []
    with progress_bar("drawing microscopes", len(GRADERS) * draws) as (progress, task):
        for number, grader in enumerate(GRADERS):
            results = []
            for draw in range(draws):
                results.append(measure_draw(grader, np.random.default_rng([seed, number, draw])))
                progress.update(task, advance=1)
            rows.append(asdict(grader) | summarize(results, parse_targets(grader.targets)))
    settings = {
        "draws": draws, "seed": seed, "unseen_microscopes": _UNSEEN, "images_per_microscope": _IMAGES_EACH,
        "shares": SHARES.round(4).tolist(),
    }  # fmt: skip
    result = write_result(out, KIND, settings, rows, {})
    _show(rows)
    console.print(f"{SUMMARY_FILE}: {storage.join(storage.absolute(out), SUMMARY_FILE)}")
    return result


def measure_draw(grader: Grader, rng: np.random.Generator) -> dict[str, Any]:
    """Fit a decision on the microscopes of one draw, and measure it on unseen ones."""
    logits, labels, groups = draw_images(grader, grader.microscopes, grader.images, rng)
    spec = fit_decision(
        SPEC, logits, _no_statistics(labels), labels, groups.tolist(), coverage=SPEC.conformal.coverage,
        targets=parse_targets(grader.targets), prior_moved=grader.balanced,
    )  # fmt: skip
    logits, labels, _ = draw_images(grader, _UNSEEN, _UNSEEN * _IMAGES_EACH, rng)
    answers = make_gradings(logits, _no_statistics(labels), spec)
    grades = np.array([answer.grade for answer in answers])
    answered = ~np.array([answer.refer for answer in answers])
    covered = np.array([label in answer.grade_set for label, answer in zip(labels, answers, strict=True)])
    return {
        "top1": float((grades == labels).mean()),
        "probability_by_grade": np.mean([answer.probabilities for answer in answers], axis=0),
        "share_by_grade": np.bincount(labels, minlength=NUM_GRADES) / len(labels),
        "promise": spec.conformal.coverage,
        "coverage": float(covered.mean()),
        "coverage_by_grade": np.array([covered[labels == grade].mean() for grade in range(NUM_GRADES)]),
        "promised_by_grade": np.array(spec.conformal.grade_groups) > 0,
        "set_size": float(np.mean([len(answer.grade_set) for answer in answers])),
        "answered": float(answered.mean()),
        **{kind: measure_share(kind, labels, grades, ~answered) or 0.0 for kind in KINDS},
    }


def draw_images(
    grader: Grader, microscopes: int, images: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw logits (N, 4), labels (N,) and microscopes (N,) of images."""
    groups = rng.choice(microscopes, images, p=rng.dirichlet(np.full(microscopes, _EVENNESS)))
    severity, offsets = rng.normal(size=images), grader.offset * rng.normal(size=microscopes)
    spread = np.hypot(grader.noise, grader.offset)
    cuts = special.ndtri(np.cumsum(SHARES)[:-1]) * np.hypot(1, spread)
    labels = np.searchsorted(cuts, severity + offsets[groups] + grader.noise * rng.normal(size=images))
    below = special.ndtr((cuts - severity[:, None]) / spread)
    probs = np.diff(below, axis=1, prepend=0, append=1).clip(1e-12)
    if grader.balanced:
        probs /= SHARES
    return np.log(probs).astype(np.float32), labels, groups


def summarize(results: list[dict[str, Any]], limits: Mapping[Kind, float]) -> dict[str, Any]:
    """Summarize the draws of one grader: means, and shares of the draws that keep each target."""
    stacked = {name: np.array([result[name] for result in results]) for name in results[0]}
    summary: dict[str, Any] = {
        name: float(values.mean()) if values.ndim == 1 else values.mean(axis=0).tolist()
        for name, values in stacked.items()
    }
    distance = stacked["coverage_by_grade"].mean(axis=0) - stacked["promise"].mean()
    summary |= {
        "coverage_minus_promise": [float(distance.min()), float(distance.max())],
        "coverage_lowest_by_grade": stacked["coverage_by_grade"].min(axis=0).tolist(),
        "coverage_within_2_points": bool(np.abs(distance).max() <= _POINTS),
    }
    for kind, limit in limits.items():
        values = stacked[kind] if kind == "wrong" else -stacked[kind]
        summary[f"{kind}_worst"] = abs(float(values.max()))
        summary[f"{kind}_kept"] = float((values <= (limit if kind == "wrong" else -limit)).mean())
    return summary


def _show(rows: list[dict[str, Any]]) -> None:
    sets = Table("grader", "top-1", "promise", *GRADE_NAMES, "set size", title="coverage of grade sets")
    kept = Table(
        "grader", "targets", "answered", *KINDS, title="referral, and share of draws that keep a target"
    )
    for row in rows:
        name = (
            f"noise {row['noise']:g}, offset {row['offset']:g}{', balanced' * row['balanced']}: "
            f"{row['images']:,} images, {row['microscopes']} microscopes"
        )
        sets.add_row(
            name,
            *(f"{row[key]:.3f}" for key in ("top1", "promise")),
            *(f"{value:.3f}" for value in row["coverage_by_grade"]),
            f"{row['set_size']:.2f}",
        )
        shares = (
            f"{row[kind]:.1%}" + (f" ({row[f'{kind}_kept']:.0%})" if f"{kind}_kept" in row else "")
            for kind in KINDS
        )
        kept.add_row(name, row["targets"], f"{row['answered']:.1%}", *shares)
    for table in (sets, kept):
        console.print(table)


def _no_statistics(labels: np.ndarray) -> np.ndarray:
    return np.zeros((len(labels), len(STATISTICS)), np.float32)

"""`scalp synth --symptoms all`: grades, label files, and pixels that differ by the grade."""

import json
from functools import cache

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import cohen_kappa_score

from scalp_core.datasets import manifest
from scalp_core.grades import SYMPTOM_IDS
from scalp_core.synthetic.dataset import write_dataset, write_image
from scalp_core.synthetic.plan import SynthOptions, plan_dataset
from scalp_core.synthetic.profiles import OtherSeverities
from scalp_core.synthetic.scene import render_image
from scalp_core.synthetic.severity import SHARES
from tests.support.sources import audited

OTHERS = SYMPTOM_IDS[1:]


@pytest.fixture(scope="module")
def plans():
    return plan_dataset(SynthOptions(images=2000, symptoms="all", seed=1))


def grades_of(plans):
    return np.array([plan.symptoms for plan in plans])


# --- plan --------------------------------------------------------------------------------------------------


def test_shares_of_grades_are_those_of_each_symptom(plans):
    for grades, shares in zip(grades_of(plans).T, SHARES, strict=True):
        assert np.bincount(grades) * 100 / len(plans) == pytest.approx(shares, abs=0.1)


def test_labels_are_the_severities_with_the_graders_error(plans):
    severities = np.array([[plan.severity, *vars(plan.others).values()] for plan in plans])
    truth = np.clip(np.rint(severities), 0, 3).astype(int)
    for labels, true_grades in zip(grades_of(plans).T, truth.T, strict=True):
        assert 0.9 < cohen_kappa_score(labels, true_grades, weights="quadratic") < 1
    exact = plan_dataset(SynthOptions(images=300, symptoms="all", label_noise=0))
    for number, name in enumerate(OTHERS, 1):
        assert all(plan.symptoms[number] == np.clip(round(vars(plan.others)[name]), 0, 3) for plan in exact)


def test_sebum_and_scale_nearly_exclude_each_other(plans):
    """Cramer's V of the real grades is 0.45, and below 0.08 for other pairs."""
    table = np.zeros((6, 6))
    grades = grades_of(plans)
    for one in range(6):
        for other in range(one):
            counts = np.histogram2d(grades[:, one], grades[:, other], bins=4)[0]
            expected = np.outer(counts.sum(1), counts.sum(0)) / counts.sum()
            table[one, other] = np.sqrt(((counts - expected) ** 2 / expected).sum() / counts.sum() / 3)
    assert 0.3 < table[1, 0] < 0.6
    assert np.delete(table.ravel(), 6).max() < 0.15


def test_people_have_severities_of_their_own(plans):
    people: dict[str, list] = {}
    for plan in plans:
        people.setdefault(plan.stem.rsplit("_", 2)[0], []).append(list(vars(plan.others).values()))
    between = np.std([np.mean(own, axis=0) for own in people.values()], axis=0)
    within = np.mean([np.std(own, axis=0) for own in people.values()], axis=0)
    assert np.all(between > 1.5 * within) and np.all(within > 0.05)


# --- files -------------------------------------------------------------------------------------------------


def test_the_default_set_is_that_of_earlier_versions(tmp_path):
    options = SynthOptions(images=3, devices=1)
    write_dataset(tmp_path, options, workers=1)
    summary = json.loads((tmp_path / "synth.json").read_text())
    assert "symptoms" not in summary and "symptoms" not in summary["options"]
    assert all(plan.others is None for plan in plan_dataset(options))


@pytest.mark.medium
def test_prepare_reads_the_grades_of_all_symptoms(tmp_path):
    options = SynthOptions(images=16, devices=4, symptoms="all", seed=2)
    summary = write_dataset(tmp_path / "set", options, workers=1)
    found = audited(tmp_path / "set", tmp_path / "data", ratio="1:1:1")
    spec = manifest.read_spec(found.data)
    assert spec.symptoms == {name: tuple(counts.values()) for name, counts in summary.symptoms.items()}
    labels = {plan.stem: list(plan.symptoms) for plan in plan_dataset(options)}
    for row in found.table.to_pylist():
        assert row["labels"] == labels[row["uri"].rsplit("/", 1)[-1].removesuffix(".jpg")]
        assert row["label"] == row["labels"][0]


def test_copies_under_each_symptom_are_in_the_folders_of_the_real_set(tmp_path):
    for plan in plan_dataset(SynthOptions(images=60, symptoms="all")):
        write_image(plan, tmp_path, every_symptom=True, picture=b"drawn elsewhere")
        copies = [path.parent.name for path in tmp_path.rglob(f"{plan.stem}.jpg")]
        assert len(copies) == (sum(grade > 0 for grade in plan.symptoms) or 6)


# --- pixels ------------------------------------------------------------------------------------------------


def _draw(symptom: str, grade: int, seed: int) -> np.ndarray:
    """One scene at a grade of one symptom, without the others; float32 (480, 640, 3)."""
    return _render(OtherSeverities(**{symptom: float(grade)}), seed)


@cache  # a scene at grade 0 is one of all symptoms
def _render(others: OtherSeverities, seed: int) -> np.ndarray:
    device = plan_dataset(SynthOptions(images=40, seed=7, symptoms="all"))[7 * seed].device
    return render_image(0.0, device, np.random.default_rng(seed), None, others).astype(np.float32)


def _red_spread(image: np.ndarray) -> float:
    """Spread of red to green between places of the frame, on skin: a color cast changes their mean alone."""
    small = np.asarray(Image.fromarray(image.astype(np.uint8)).reduce(8), np.float32) + 1
    skin = small.sum(-1) > np.median(small.sum(-1)) * 0.8
    return float(np.std(np.log(small[..., 0] / small[..., 1])[skin]))


def _dark_share(image: np.ndarray) -> float:
    return float(np.mean(image.mean(-1) < 0.4 * np.median(image.mean(-1))))


def _highlights(image: np.ndarray) -> float:
    """Share of pixels that are bright in each color."""
    darkest = image.min(-1)
    return float(np.mean(darkest > 1.45 * np.median(darkest)))


def _bright_blocks(image: np.ndarray) -> float:
    """Share of blocks of 16 pixels that are bright as a whole; fine flakes and reflections are smaller."""
    blocks = np.asarray(Image.fromarray(image.mean(-1).astype(np.uint8)).reduce(16), np.float32)
    return float(np.mean(blocks > 1.25 * np.median(blocks)))


@pytest.mark.medium
@pytest.mark.parametrize(
    ("symptom", "statistic", "sign"),
    [
        ("erythema_between_follicles", _red_spread, 1),
        ("follicular_pustules", _red_spread, 1),
        ("excess_sebum", _highlights, 1),
        ("dandruff", _bright_blocks, 1),
        ("hair_loss", _dark_share, -1),
    ],
)
def test_a_symptom_can_be_seen(symptom, statistic, sign):
    """A plain statistic of the pixels rises from grade to grade, on several people and microscopes."""
    means = [np.mean([statistic(_draw(symptom, grade, seed)) for seed in range(3)]) for grade in range(4)]
    assert np.all(sign * np.diff(means) > 0)
    low, high = sorted((means[0], means[3]))
    assert high > 1.5 * low

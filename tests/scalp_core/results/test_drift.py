"""Drift from the training split: none without changes, strong for darker images, unknown for few images."""

from datetime import UTC, datetime
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalp_core.bundles.contract import BundleSpec, Conformal, InitialWeights, Training
from scalp_core.images import gates as image_gates
from scalp_core.images.preprocess import Preprocess
from scalp_core.images.stability import grade_mix_limit
from scalp_core.images.statistics import STATISTICS
from scalp_core.results.drift import MIN_PHOTOGRAPHS, Counts, count_statistics, measure_drift, psi

EVEN = {"good": 500, "mild": 500, "moderate": 500, "severe": 500}
LUMA, DARK, BRIGHT = (STATISTICS.index(name) for name in ("luma_mean", "dark_share", "bright_share"))


def draw(photographs: int, seed: int) -> np.ndarray:
    """Statistics like those of real images: most are smooth, two are 0 or slightly above."""
    rng = np.random.default_rng(seed)
    found = rng.normal(0, 1, (photographs, 19))
    found[:, LUMA] = rng.normal(0.55, 0.06, photographs)
    found[:, DARK] = rng.poisson(0.2, photographs) / 2025  # 82 % have none
    found[:, BRIGHT] = rng.poisson(3.2, photographs) / 2025  # 4 % have none
    return found.astype(np.float32)


@pytest.fixture(scope="module")
def gates():
    return image_gates.fit_gates(draw(4000, 0), draw(1000, 1))


def spec(gates, grade_counts=(1000, 1000, 1000, 1000)):
    return BundleSpec(
        name="made",
        created_at=datetime.now(UTC),
        architecture="none",
        preprocess=Preprocess(),
        temperature=1.0,
        conformal=Conformal(coverage=0.9, quantile=0.8),
        training=Training(
            recipe={},
            initial_weights=InitialWeights(source="none"),
            workers=1,
            best_epoch=1,
            data_sha256="",
            grade_counts=list(grade_counts),
        ),
        metrics={},
        versions={},
        git_revision=None,
        weights_sha256="0" * 64,
        gates=gates,
    )


@pytest.mark.parametrize("seed", range(2, 22))
def test_photographs_like_those_of_training_have_not_drifted(gates, seed):
    found = measure_drift(count_statistics(draw(2000, seed), gates), EVEN, spec(gates))
    assert {each.level for each in found.statistics} == {"none"}
    assert (found.level, found.flag) == ("none", False)
    assert found.sentence.startswith("no drift")
    assert max(abs(each.shift) for each in found.statistics) < 0.15


def test_darkened_photographs_have_drifted_in_luma_and_in_nothing_else(gates):
    dark = draw(2000, 2)
    dark[:, LUMA] *= 0.7
    found = measure_drift(count_statistics(dark, gates), EVEN, spec(gates))
    levels = {each.name: each.level for each in found.statistics}
    assert levels.pop("luma_mean") == "strong"
    assert set(levels.values()) == {"none"}
    assert found.flag
    assert found.sentence.startswith("DRIFT: luma_mean differs strongly from the training split")
    (luma,) = [each for each in found.statistics if each.name == "luma_mean"]
    assert luma.mean == pytest.approx(dark[:, LUMA].mean(), rel=1e-6)
    assert luma.shift == pytest.approx(-0.165 / 0.06, rel=0.1)


def test_value_shared_by_many_images_is_no_drift_and_its_loss_is(gates):
    """82 % of training images have no dark pixels: five of the seven quantiles are equal."""
    assert gates.profile["dark_share"].quantiles[:5] == (0, 0, 0, 0, 0)
    changed = draw(2000, 3)
    changed[:, DARK] += 1 / 2025
    levels = {
        each.name: each.level
        for each in measure_drift(count_statistics(changed, gates), EVEN, spec(gates)).statistics
    }
    assert levels["dark_share"] == "strong"
    assert levels["bright_share"] == "none"


@pytest.mark.medium
def test_an_empty_tail_alone_is_no_drift(gates):
    few = draw(500_000, 4)
    quantiles = gates.profile["luma_mean"].quantiles
    few[:, LUMA] = few[:, LUMA].clip(quantiles[0] + 1e-3, quantiles[-1] - 1e-3)
    levels = {
        each.name: each.level
        for each in measure_drift(count_statistics(few, gates), EVEN, spec(gates)).statistics
    }
    assert levels["luma_mean"] == "none"


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 700), max_size=6))
def test_counts_of_shards_add_up_to_those_of_all_at_once(gates, cuts):
    photographs = draw(700, 5)
    whole = count_statistics(photographs, gates)
    added = sum(
        (count_statistics(shard, gates) for shard in np.split(photographs, sorted(cuts))), Counts.empty()
    )
    for name in ("photographs", "below", "up_to"):
        assert getattr(added, name) == getattr(whole, name)
    for name in ("sums", "squares"):
        assert getattr(added, name) == pytest.approx(getattr(whole, name), rel=1e-12)
    assert Counts.model_validate_json(whole.model_dump_json()) == whole


def test_bins_are_those_between_the_quantiles(gates):
    photographs = draw(3000, 6)
    counts = count_statistics(photographs, gates)
    for index, name in enumerate(STATISTICS):
        edges = [-np.inf, *gates.profile[name].quantiles, np.inf]
        expected = [
            np.sum((photographs[:, index] >= low) & (photographs[:, index] < high))
            for low, high in pairwise(edges)
        ]
        assert np.diff([0, *counts.below[index], 3000]).tolist() == expected


def test_grade_mix_of_another_microscope_of_the_population_is_no_drift(gates):
    """Each microscope has patients of its own, so the mix of a new one differs from that of all others."""
    rng = np.random.default_rng(0)
    population = np.array([0.2, 0.4, 0.3, 0.1])

    def mixes(microscopes):
        return rng.dirichlet(population * 8, microscopes)

    flagged = {True: 0, False: 0}
    for _ in range(40):
        training = mixes(40)
        labels = np.concatenate([rng.choice(4, 60, p=mix) for mix in training])
        limit = grade_mix_limit(labels, np.repeat(np.arange(40), 60).tolist())
        plain = spec(gates, np.bincount(labels, minlength=4))
        limited = plain.model_copy(
            update={"training": plain.training.model_copy(update={"grade_mix_limit": limit})}
        )
        new = np.bincount(rng.choice(4, 400, p=mixes(1)[0]), minlength=4)
        by_grade = dict(zip(plain.grade_names, new.tolist(), strict=True))
        for bundle, has_limit in ((limited, True), (plain, False)):
            flagged[has_limit] += measure_drift(None, by_grade, bundle).flag
    assert flagged[True] <= 4  # 95 % of the training microscopes keep the limit
    assert flagged[False] >= 10
    all_severe = dict.fromkeys(plain.grade_names, 0) | {plain.grade_names[3]: 400}
    assert measure_drift(None, all_severe, limited).flag


def test_without_many_images_of_five_groups_the_grade_mix_has_no_limit():
    assert grade_mix_limit(np.tile([0, 1, 2, 3], 100), [0, 1, 2, 3] * 100) is None
    assert grade_mix_limit(np.tile([0, 1, 2, 3], 100), np.repeat(np.arange(20), 20).tolist()) is None


def test_too_few_images_are_reported_and_not_flagged(gates):
    black = np.zeros((MIN_PHOTOGRAPHS // 3, 19), np.float32)
    found = measure_drift(count_statistics(black, gates), {"severe": 50}, spec(gates))
    assert {each.level for each in found.statistics} == {"too_few"}
    assert (found.level, found.flag) == ("too_few", False)
    assert found.sentence.startswith("too few images")
    nothing = measure_drift(Counts.empty(), {}, spec(gates))
    assert (nothing.level, nothing.photographs) == ("too_few", 0)


def test_few_training_images_are_too_few(gates):
    few = gates.model_copy(update={"photographs": 100})
    found = measure_drift(count_statistics(draw(5000, 7), few), EVEN, spec(few))
    assert {each.level for each in found.statistics} == {"too_few"}


def test_another_grade_mix_is_flagged_by_that_name(gates):
    mix = {"good": 1900, "mild": 50, "moderate": 30, "severe": 20}
    found = measure_drift(count_statistics(draw(2000, 8), gates), mix, spec(gates))
    assert found.grades.level == "strong"
    assert found.grades.shares["good"] == pytest.approx(0.95)
    assert found.sentence.startswith("DRIFT: the grade mix differs strongly")
    assert measure_drift(None, {"good": 800, "mild": 900}, spec(gates, (800, 900, 0, 0))).level == "none"


def test_the_grade_mix_is_compared_with_answers_and_not_with_labels():
    """A model may never answer a rare grade: its answers then differ from the labels without any drift."""
    answered = {"good": 0, "mild": 2000, "moderate": 2200, "severe": 800}
    labeled = spec(None, (210, 1740, 2155, 895))
    assert measure_drift(None, answered, labeled).grades.level == "strong"  # an older bundle, without metrics
    confusion = [[0, 53, 0, 0], [0, 443, 0, 0], [0, 0, 549, 0], [0, 0, 20, 208]]
    known = labeled.model_copy(update={"metrics": {"val": {"confusion": confusion}}})
    found = measure_drift(None, answered, known).grades
    assert (found.level, found.shares_at_training["good"]) == ("none", 0)


def clustered(rng: np.random.Generator, microscopes: int, each: int, share: float) -> np.ndarray:
    """Statistics of which microscopes have a share of the variance, float (microscopes * each, 19)."""
    offsets = np.repeat(rng.normal(size=(microscopes, 19)), each, axis=0)
    noise = rng.normal(size=(microscopes * each, 19))
    return (np.sqrt(share) * offsets + np.sqrt(1 - share) * noise).astype(np.float32)


@pytest.mark.medium
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_new_microscopes_of_the_population_are_seldom_flagged_and_changed_images_are(share):
    """Independent images were assumed: a single new microscope was flagged in 100 % of the draws."""
    rng, flags, changed = np.random.default_rng(7), [], []
    groups = np.repeat(np.arange(50), 60)
    for _ in range(2):
        train = clustered(rng, 50, 60, share)
        fitted = image_gates.fit_gates(train, clustered(rng, 8, 100, share), groups.tolist())
        assert fitted.profile["saturation"].limit > 0
        for microscopes, each in ((1, 400), (3, 400), (10, 100)) * 10:
            new = clustered(rng, microscopes, each, share)
            flags.append(measure_drift(count_statistics(new, fitted), EVEN, spec(fitted)).flag)
            new[:, LUMA] += 4
            changed.append(measure_drift(count_statistics(new, fitted), EVEN, spec(fitted)).flag)
    assert np.mean(flags) <= 0.1
    assert np.mean(changed) == 1


@pytest.mark.medium
def test_groups_of_a_few_images_give_no_limit():
    train = draw(2000, 9)
    fitted = image_gates.fit_gates(train, train, np.repeat(np.arange(200), 10).tolist())
    assert {profile.limit for profile in fitted.profile.values()} == {None}


def test_without_gates_only_the_grade_mix_is_compared():
    found = measure_drift(None, EVEN, spec(None))
    assert found.statistics is None
    assert found.level == "none"
    assert found.sentence.endswith("(only the grade mix was compared: the bundle has no gates)")


def test_the_index_is_the_textbook_one():
    now, expected = np.array([0.3, 0.7]), np.array([0.5, 0.5])
    assert psi(now, expected, 1000) == pytest.approx(-0.2 * np.log(0.6) + 0.2 * np.log(1.4))

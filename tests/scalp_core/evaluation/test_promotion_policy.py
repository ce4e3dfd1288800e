"""`promotion.yaml`: strict reading, and rules that a version passes only by what it showed."""

import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from scalp_core.errors import UserError
from scalp_core.evaluation.paired import METRICS, Answers
from scalp_core.evaluation.promotion_policy import Metric, load_policy

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture
def policy(tmp_path):
    def make(*rules, head="data: [a]"):
        path = tmp_path / "promotion.yaml"
        path.write_text("\n".join([head, "rules:", *(f"  - {{{rule}}}" for rule in rules), ""]))
        return load_policy(str(path))

    return make


def draw(right, images=1200, groups=30, seed=0):
    """Labels, groups, columns, and answers of which the share `right` is right and none is referred."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(4, size=images)
    wrong = np.where(labels < 3, labels + 1, 2)
    grades = np.where(np.arange(images) % 1000 < 1000 * right, labels, wrong)
    order = rng.permutation(images)
    answers = Answers(grades[order], np.ones(images, bool), np.zeros(images, bool))
    columns = {name: ["unknown"] * images for name in ("device", "position", "age")}
    columns["sex"] = np.where(np.arange(images) % 3, "female", "male").tolist()
    return labels[order], (np.arange(images) % groups).tolist(), columns, answers


def decide(policy, right, promoted=None, **options):
    labels, groups, columns, candidate = draw(right, **options)
    before = None if promoted is None else draw(promoted, **options)[3]
    return policy.decide(labels, candidate, before, groups, columns, "a").results


def test_every_compared_metric_may_be_in_a_policy():
    assert set(get_args(Metric)) == set(METRICS)


def test_the_example_of_the_docs_is_a_policy(tmp_path):
    (example,) = re.findall(r"```yaml\n(# promotion.yaml.*?)```", (DOCS / "models.md").read_text(), re.DOTALL)
    path = tmp_path / "promotion.yaml"
    path.write_text(example)
    read = load_policy(str(path))
    lines = example.splitlines()
    assert all(lines[line - 1].lstrip().startswith("- {metric:") for line in read.lines)
    rules = read.policy.rules
    assert any(rule.where for rule in rules) and any(rule.max_loss is not None for rule in rules)


MISTAKES = {
    "metric: qwk, at_leest: 0.8": "rules.0.at_leest",
    "metric: kappa, at_least: 0.8": "rules.0.metric",
    "metric: qwk": "give one of at_least, at_most and max_loss",
    "metric: qwk, at_least: 0.8, max_loss: 0.1": "give one of at_least, at_most and max_loss",
    "metric: qwk, at_most: 0.8": "at_most does not fit qwk",
    "metric: referred, at_least: 0.8": "at_least does not fit referred",
    "metric: qwk, at_least: '0.8'": "rules.0.at_least",
    "metric: qwk, at_least: 80": "rules.0.at_least",
    "metric: qwk, at_least: 0.8, at_least: 0.1": "line 3: 'at_least' is repeated",
    "metric: qwk, at_least: 0.8, where: {clinic: a}": "rules.0.where.clinic",
}


@pytest.mark.parametrize("rule", MISTAKES)
def test_a_mistake_in_a_policy_is_refused(policy, rule):
    with pytest.raises(UserError, match=f"promotion.yaml.*{re.escape(MISTAKES[rule])}"):
        policy(rule)


def test_other_mistakes_are_refused(policy, tmp_path):
    with pytest.raises(UserError, match="unknown key 'dta'; did you mean 'data'"):
        policy("metric: qwk, at_least: 0.8", head="dta: [a]")
    for text in ("- a\n", "data: [a\n", ""):
        (tmp_path / "broken.yaml").write_text(text)
        with pytest.raises(UserError, match=r"broken\.yaml"):
            load_policy(str(tmp_path / "broken.yaml"))
    with pytest.raises(UserError, match=r"data does not list data/ \(fingerprint b\)"):
        policy("metric: qwk, at_least: 0.8").check_data("data/", "b")


def test_a_version_that_keeps_all_rules_passes(policy):
    rules = policy(
        "metric: top1, at_least: 0.9", "metric: recall_severe, at_least: 0.85",
        "metric: wrong_among_answered, at_most: 0.1", "metric: qwk, max_loss: 0.02",
        "metric: top1, at_least: 0.9, where: {sex: male}",
    )  # fmt: skip
    results = decide(rules, 0.95, promoted=0.95)
    assert [result.passed for result in results] == [True] * 5
    assert [result.line for result in results] == [3, 4, 5, 6, 7]
    assert (results[0].images, results[4].images) == (1200, 400)
    for result, sign in zip(results, (-1, -1, 1, 1, -1), strict=True):
        assert sign * (result.bound - result.value) > 0  # the bound is on the bad side


FAILURES = {
    "metric: top1, at_least: 0.9": "top1 at least 0.9: it is 0.8.. and may be 0.8",
    "metric: wrong_among_answered, at_most: 0.1": "wrong_among_answered at most 0.1: it is 0.1",
    "metric: top1, max_loss: 0.02": "top1 max loss 0.02: it is 0.0.. and may be 0",
    "metric: qwk, at_least: 0.1, where: {sex: other}": "sex=other: no images",
}


@pytest.mark.parametrize("rule", FAILURES)
def test_a_version_that_breaks_a_rule_is_refused_with_its_line(policy, rule):
    rules = policy("metric: top1, at_least: 0.5", rule)
    with pytest.raises(UserError, match=f"promotion.yaml, line 4: .*{FAILURES[rule]}"):
        decide(rules, 0.85, promoted=0.95)


def test_few_images_or_one_microscope_pass_no_rule_by_chance(policy):
    floor = policy("metric: recall_severe, at_least: 0.9")
    assert decide(floor, 1.0)[0].passed
    with pytest.raises(UserError, match=r"it is 1\.000 and may be 0\.[5-8]"):
        decide(floor, 1.0, images=40, groups=10)
    with pytest.raises(UserError, match="one group has no confidence bound"):
        decide(floor, 1.0, groups=1)


def test_the_first_version_has_no_loss(policy):
    (result,) = decide(policy("metric: qwk, max_loss: 0.01"), 0.2)
    assert result.passed and result.note == "no version is promoted" and result.bound is None

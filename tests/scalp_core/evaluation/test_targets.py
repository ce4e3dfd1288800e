import numpy as np
import pytest
from scipy import stats

from scalp_core.evaluation.targets import bound_share, independent_units, parse_targets


def test_targets_are_parsed_by_kind():
    assert parse_targets("wrong<=5%") == {"wrong": 0.05}
    assert parse_targets(" found >= 97.5 %,wrong<=10%") == {"found": 0.975, "wrong": 0.1}
    assert parse_targets("none") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wrong<5%", "'wrong<5%' is not a target; write wrong<=5%, found>=95%"),
        ("found<=5%", "is not a target"),
        ("wrong<=0.05", "is not a target"),
        ("wrong<=0%", "not between 0 and 100 %"),
        ("wrong<=5%,wrong<=6%", "is repeated"),
        ("", "is not a target"),
    ],
)
def test_another_target_is_refused_with_an_example(text, message):
    with pytest.raises(ValueError, match=message):
        parse_targets(text)


def test_the_bound_of_independent_images_is_the_exact_binomial_one():
    events = np.arange(500) < 20
    exact = stats.beta.ppf(0.95, 21, 480)
    assert bound_share(events, np.arange(500)) == pytest.approx(exact, abs=0.003)
    assert bound_share(np.zeros(59, bool), np.arange(59)) == pytest.approx(0.05, abs=0.001)  # rule of three


def test_the_bound_is_wider_if_few_groups_have_most_events():
    alike = np.repeat(np.arange(10), 50)
    spread, bunched = np.arange(500) % 25 == 0, np.arange(500) < 20
    assert bound_share(bunched, alike) > 2 * bound_share(spread, alike)
    assert bound_share(spread, alike) > bound_share(spread, np.arange(500))
    assert bound_share(spread, np.zeros(500, int)) == 1  # a single group proves nothing


def test_the_bound_over_groups_keeps_its_confidence():
    rng, kept = np.random.default_rng(0), []
    for _ in range(400):
        rates = rng.beta(2, 18, 12)  # of each microscope, 0.1 on average
        events = rng.random((40, 12)) < rates
        kept.append(bound_share(events.T.ravel(), np.repeat(np.arange(12), 40)) >= 0.1)
    assert np.mean(kept) > 0.91


def test_images_of_a_single_group_are_independent_units():
    assert independent_units(["a", "b", "a"]).tolist() == [0, 1, 0]
    assert independent_units(["a", "a", "a"]).tolist() == [0, 1, 2]

"""History of the model registry: promotions, rollbacks, evidence, and concurrent entries."""

from datetime import UTC, datetime
from threading import Barrier

import pytest

from scalp_core import storage
from scalp_core.bundles import registry_records
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.promotion_history import History
from scalp_core.bundles.registry_records import Evidence, Promotion
from scalp_core.errors import UserError
from scalp_core.evaluation.noninferiority import Comparison
from scalp_core.evaluation.promotion_policy import PolicyResult
from tests.support.threads import at_once


@pytest.mark.medium
def test_a_rollback_goes_back_step_by_step(store, run):
    for number in (1, 2, 3):
        store.add(run(number), "scalp")
        store.promote("scalp", number, why=f"trial {number}", untested=True)
    assert [store.rollback("scalp", "worse").version for _ in range(2)] == [2, 1]
    with pytest.raises(UserError, match="no version was promoted before the current one \\(scalp@1\\)"):
        store.rollback("scalp")
    entry, new = store.promote("scalp", 1, untested=True)
    assert (entry.action, new) == ("rollback", False)
    entries = [(entry.action, entry.version, entry.why) for entry in store.history("scalp")]
    assert entries == [
        ("promote", 1, "trial 1"), ("promote", 2, "trial 2"), ("promote", 3, "trial 3"),
        ("rollback", 2, "worse"), ("rollback", 1, "worse"),
    ]  # fmt: skip
    assert "@" in store.history("scalp")[0].who


@pytest.mark.medium
def test_history_continues_after_a_lost_entry(store, run):
    for number in range(1, 4):
        store.add(run(number), "scalp")
    store.promote("scalp", 1, untested=True)
    store.promote("scalp", 2, untested=True)
    storage.remove_file(storage.join(store.root, "scalp", "history", "000001.json"))
    store.promote("scalp", 3, untested=True)
    assert [entry.version for entry in store.history("scalp")] == [2, 3]
    assert [store.rollback("scalp").version, store.current("scalp").version] == [2, 2]
    with pytest.raises(UserError, match="no version was promoted before the current one \\(scalp@2\\)"):
        store.rollback("scalp")
    names = storage.names_in(storage.join(store.root, "scalp", "history"))
    assert names == {"000002.json", "000003.json", "000004.json"}


P, R = "promote", "rollback"
WHOLE = [(P, 1), (P, 2), (P, 3), (R, 2), (P, 4), (R, 2), (R, 1)]
# Of WHOLE up to an entry, and without those that are lost: what rollbacks lead to, one after another.
STACKS = [
    (7, (), [1]),
    (5, (), [4, 2, 1]),
    (4, (1,), [2, 1]),  # the promotion that the rollback leads back to
    (7, (3, 5), [1]),  # both rollbacks to 2
    (5, (3,), [4, 3, 2, 1]),  # nothing says that 3 was rolled back
    (6, (0, 1, 2), [2]),
    (6, (3, 4), [2, 1]),
    (7, (0, 1, 2, 3, 4, 5), [1]),
]


@pytest.mark.parametrize(("length", "lost", "stack"), STACKS)
def test_rollbacks_with_lost_entries_lead_to_versions_that_were_promoted(length, lost, stack):
    entries = [
        Promotion(action=action, version=version, model_version="m", who="w", when=datetime.now(UTC))
        for number, (action, version) in enumerate(WHOLE[:length])
        if number not in lost
    ]
    assert registry_records.stack_promoted(entries)[::-1] == stack


@pytest.mark.medium
def test_one_of_concurrent_promotions_succeeds_and_others_fail(store, run, monkeypatch):
    for number in range(1, 4):
        store.add(run(number), "scalp")
    entries, seen = History.entries, Barrier(3)
    with monkeypatch.context() as slow:  # all decide on the same history, as if none had been quicker
        slow.setattr(History, "entries", lambda history: (entries(history), seen.wait())[0])
        results = at_once(3, lambda index: store.promote("scalp", index + 1, untested=True))
    errors = [result for result in results if isinstance(result, UserError)]
    (winner,) = (result[0] for result in results if not isinstance(result, UserError))
    assert len(errors) == 2
    assert all(f"meanwhile {winner.who} promoted version {winner.version}" in str(error) for error in errors)
    assert store.history("scalp") == [winner]
    store.promote("scalp", winner.version % 3 + 1, untested=True)
    names = storage.names_in(storage.join(store.root, "scalp", "history"))
    assert names == {"000001.json", "000002.json"}


def evidence(against, bound):
    return Evidence(
        against=against,
        against_model="scalp-0123",
        data="data",
        data_sha256="0" * 64,
        same_data=True,
        comparison=Comparison(
            images=100, groups=5, confidence=0.95, max_drop=0.01, qwk_drop=0.0, qwk_drop_bound=bound,
            coverage=0.9, promised_coverage=0.9, coverage_drop=0.0, coverage_drop_bound=0.0,
        ),
    )  # fmt: skip


@pytest.mark.medium
def test_a_changed_entry_of_the_history_is_detected(store, run):
    for number in range(1, 4):
        store.add(run(number), "scalp")
        store.promote("scalp", number, why="trial", untested=True)
    second = storage.join(store.root, "scalp", "history", "000002.json")
    storage.write(second, storage.read(second).replace(b"trial", b"proof"))
    with pytest.raises(UserError, match="000002.json was changed after entry 3 recorded its hash"):
        store.promote("scalp", 1, untested=True)
    with pytest.raises(UserError, match="was changed"):
        load_bundle("models://scalp")


@pytest.mark.medium
def test_a_policy_must_decide_about_each_promotion(store, run):
    for number in (1, 2):
        store.add(run(number), "scalp")
    uri = storage.join(store.root, "scalp", "promotion.yaml")
    storage.write(uri, b"data: [a]\nrules:\n  - {metric: qwk, at_least: 0.8}\n")
    assert store.names() == ["scalp"]
    policy = store.policy("scalp")
    decision = PolicyResult(policy_sha256=policy.sha256, policy=policy.policy, data_sha256="a", results=[])
    with pytest.raises(UserError, match="promotion.yaml has not decided about scalp@1"):
        store.promote("scalp", 1, untested=True)
    entry, _ = store.promote("scalp", 1, decision=decision)
    assert store.history("scalp") == [entry] and entry.policy == decision
    storage.write(uri, storage.read(uri).replace(b"0.8", b"0.9"))  # the decision was by another policy
    with pytest.raises(UserError, match="promotion.yaml has not decided about scalp@2"):
        store.promote("scalp", 2, evidence=evidence(1, 0.0), decision=decision)


@pytest.mark.medium
def test_evidence_decides_a_promotion_and_stays_in_the_history(store, run):
    for number in range(1, 4):
        store.add(run(number), "scalp")
    store.promote("scalp", 1)
    with pytest.raises(UserError, match="scalp@1 is promoted .* scalp@2 was not compared"):
        store.promote("scalp", 2)  # as when both are the first promotion, and the other one was faster
    with pytest.raises(UserError, match="scalp@2 against scalp@1 .* may be as large as 0.0200"):
        store.promote("scalp", 2, evidence=evidence(1, 0.02))
    entry, new = store.promote("scalp", 2, evidence=evidence(1, 0.009))
    assert new
    assert store.history("scalp")[-1] == entry
    # Another promotion came while the two were compared.
    with pytest.raises(UserError, match="compared with scalp@1, but meanwhile .* promoted scalp@2"):
        store.promote("scalp", 3, evidence=evidence(1, 0.0))

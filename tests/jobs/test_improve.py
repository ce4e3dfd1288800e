"""`scalp improve`: a round of prepare, train, evaluate and registry; a made bundle replaces the training."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest

from jobs import improve as module
from jobs.common.local_executor import LocalExecutor
from jobs.data.prepare import prepare
from jobs.improve import RoundOptions
from scalp_core import storage
from scalp_core.bundles.bundle import open_bundle, save_bundle
from scalp_core.bundles.registry import ENVIRONMENT, Registry
from scalp_core.curation.audit import Options
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.evaluation.promotion_policy import POLICY_FILE
from scalp_core.labels.log import read_labels
from tests.support.bundles import make_bundle
from tests.support.labels import columns, write_log
from tests.support.plots import leave_undrawn
from tests.support.preparing import picture

IMAGES = 48


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prepared data with groups of two images; rounds write elsewhere."""
    folder, rows = tmp_path_factory.mktemp("prepared"), []
    for index in range(IMAGES):
        storage.write(f"{folder}/set/{index}.jpg", picture(index))
        rows.append(f"set/{index}.jpg,{index % 4},p{index // 2}")
    (folder / "labels.csv").write_text("\n".join(["uri,label,group", *rows]))
    prepare(str(folder / "labels.csv"), str(folder / "data"), Options(), executor=LocalExecutor())
    return str(folder / "data")


@pytest.fixture(autouse=True)
def _undrawn_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_undrawn(monkeypatch)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry with one promoted version."""
    registry = Registry(str(tmp_path / "registry"))
    monkeypatch.setenv(ENVIRONMENT, registry.root)
    registry.add(str(make_bundle(tmp_path / "first", 1)), "scalp")
    registry.promote("scalp", 1)
    return registry


@pytest.fixture
def labels(tmp_path: Path) -> str:
    """A label log with answers about six new images."""
    answers = []
    for index in range(100, 106):
        uri, content = f"{tmp_path}/new/{index}.jpg", picture(index)
        storage.write(uri, content)
        digest = sha256(content).hexdigest()
        places = {"uri": uri, "sha256": digest, "image_id": digest[:20]}
        answers.append(columns(str(index), "kim", index % 4, **places))
    write_log(str(tmp_path / "labels"), answers)
    return str(tmp_path / "labels")


@pytest.fixture
def trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Arguments of the trainings, each of which writes a bundle with the provenance of its data."""
    calls = []

    def train(data, run, recipe, workers, device):
        calls.append((data, run, recipe))
        made, spec = (
            open_bundle(str(make_bundle(tmp_path / f"made-{len(calls)}", 2))),
            manifest.read_spec(data),
        )
        provenance = {"data_sha256": spec.sha256, "reviews": spec.reviews, "extends": spec.extends}
        training = made.spec.training.model_copy(update=provenance)
        files = {name: storage.read(f"{made.uri}/{name}") for name in made.spec.file_hashes}
        save_bundle(f"{run}/bundle", made.spec.model_copy(update={"training": training}), files)

    monkeypatch.setattr(module, "train", train)
    return calls


def improve(labels: str, data: str, out: Path, **options: object) -> dict:
    return module.improve("models://scalp", labels, data, str(out), RoundOptions(**options), LocalExecutor())


@pytest.mark.medium
def test_a_round_adds_a_version_and_prints_what_it_bought(
    data, registry, labels, trainings, tmp_path, capsys
):
    summary = improve(labels, data, tmp_path / "round", overrides=("learning_rate=1e-4",))
    ((trained_on, _, recipe),) = trainings
    assert (recipe.weights, recipe.learning_rate) == ("models://scalp@1", 1e-4)
    test = manifest.select_split(manifest.read_manifest(data), "test")
    assert manifest.select_split(manifest.read_manifest(trained_on), "test")["sha256"] == test["sha256"]
    assert summary["comparison"]["images"] == len(test)
    assert (summary["before"], summary["after"]) == ("models://scalp@1", "models://scalp@2")
    assert json.loads((tmp_path / "round/summary.json").read_text()) == summary
    printed = " ".join(capsys.readouterr().out.split())
    assert "before and after 6 answers, which label 6 new images" in printed
    for words in ("quadratic weighted kappa", "referred to a person", "wrong among answered"):
        assert words in printed
    assert f"scalp models promote scalp@2 --data {data}" in printed
    assert registry.current("scalp").version == 1


@pytest.mark.medium
def test_the_history_names_the_answers_of_a_promoted_version(data, registry, labels, trainings, tmp_path):
    sha = manifest.read_spec(data).sha256
    policy = f"data: [{sha}]\nrules:\n  - {{metric: qwk, at_least: -1}}\n"
    storage.write(f"{registry.root}/scalp/{POLICY_FILE}", policy.encode())
    improve(labels, data, tmp_path / "round", promote=True, max_drop=1.0)
    entry = registry.current("scalp")
    ((log),) = entry.reviews
    assert (entry.version, log.labels, log.answers, log.images) == (2, labels, 6, 6)
    assert entry.evidence.same_data and "scalp improve" in entry.why


@pytest.mark.medium
def test_a_stopped_round_resumes_with_the_version_that_it_began_with(
    data, registry, labels, trainings, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate_models", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            improve(labels, data, tmp_path / "round")
    registry.add(str(make_bundle(tmp_path / "other", 3)), "scalp")
    registry.promote("scalp", 2, untested=True)
    assert improve(labels, data, tmp_path / "round")["before"] == "models://scalp@1"
    with pytest.raises(UserError, match="holds a round with another blind_only, "):
        improve(labels, data, tmp_path / "round", blind_only=True, overrides=("epochs=2",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": "set"}, "is not a label log"),
        ({"data": "set"}, "has no data.json"),
        ({"overrides": ("epoch=3",)}, "did you mean 'epochs'"),
        ({"promote": True}, "data does not list"),
        ({"key": "release-key"}, "add --promote"),
        ({"why": "retrained"}, "add --promote"),
    ],
)
def test_a_mistake_is_reported_before_a_step_starts(
    data, registry, labels, trainings, tmp_path, change, message
):
    policy = f"data: [{'ab' * 32}]\nrules:\n  - {{metric: qwk, at_least: -1}}\n"
    storage.write(f"{registry.root}/scalp/{POLICY_FILE}", policy.encode())
    places = {name: str(Path(data).with_name(value)) for name, value in change.items() if value == "set"}
    arguments = {"labels": labels, "data": data} | change | places
    with pytest.raises(UserError, match=message):
        improve(arguments.pop("labels"), arguments.pop("data"), tmp_path / "round", **arguments)
    assert not (tmp_path / "round").exists() and not trainings


def test_a_log_without_a_new_label_is_refused(data, registry, trainings, tmp_path):
    known = manifest.read_manifest(data).to_pylist()[0]
    places = {name: known[name] for name in ("uri", "sha256", "image_id")}
    write_log(str(tmp_path / "labels"), [columns("a", "kim", 1, **places)])
    with pytest.raises(UserError, match=r"labels no image that is not in \S+data \(1 images were reviewed\)"):
        improve(str(tmp_path / "labels"), data, tmp_path / "round")
    assert not (tmp_path / "round").exists()


@pytest.mark.medium
def test_readers_who_differ_give_soft_labels_by_a_setting(data, registry, labels, trainings, tmp_path):
    second = [
        columns(str(label.uri), "lee", (label.grade + 1) % 4, uri=label.uri, sha256=label.sha256)
        for label in read_labels(labels)
    ]
    write_log(labels, second)
    with pytest.raises(UserError, match="decide between readers with scalp review --adjudicate"):
        improve(labels, data, tmp_path / "round")
    improve(labels, data, tmp_path / "round", conflicts="soft")
    ((trained_on, _, _),) = trainings
    assert manifest.read_spec(trained_on).soft_labels == 6
    with pytest.raises(UserError, match="holds a round with another conflicts"):
        improve(labels, data, tmp_path / "round")

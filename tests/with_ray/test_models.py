"""`scalp models` as it is typed, and `models://` where a bundle is named."""

import json
import re
from functools import partial

import pytest

from jobs.common.local_executor import LocalExecutor
from jobs.models import driver as models
from scalp_core import storage
from scalp_core.bundles.bundle import save_bundle
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.registry import Registry
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from tests.support.command import run_scalp
from tests.support.ports import free_port
from tests.with_ray.test_cli import assert_error, scalp

# What promotion decides does not depend on where the models run.
promote = partial(models.promote, executor=LocalExecutor())


def printed(*arguments, **environment):
    """What a command that succeeds prints, in a wide terminal."""
    result = scalp(*arguments, COLUMNS="300", **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def second(bundle, tmp_path):
    """A run whose bundle has other figures."""
    loaded = load_bundle(str(bundle)).fetch("weights").fetch("float")
    changes = {"name": "second", "metrics": {"val": {"qwk": 0.8765}}}
    changes["training"] = loaded.spec.training.model_copy(update={"synthetic": True})
    spec = loaded.spec.model_copy(update=changes)
    save_bundle(str(tmp_path / "second" / "bundle"), spec, loaded.files)
    return tmp_path / "second"


@pytest.mark.slow
def test_models_are_added_promoted_rolled_back_and_used_by_name(bundle, second, s3, tmp_path):
    root = f"s3://scalp/registry/{tmp_path.name}"
    named = {"SCALP_MODELS": root}
    assert "holds no models; add one with scalp models add" in printed("models", "list", **named)
    assert "scalp@1" in printed("models", "add", bundle, "scalp", **named)
    assert "scalp@2" in printed("models", "add", second, "scalp", "--registry", root)
    assert "is already scalp@2" in printed("models", "add", second, "scalp", **named)

    printed("models", "promote", "scalp@1", **named)
    promoted = ("models", "promote", "models://scalp@latest", "--untested", "--why", "better")
    assert " by " in printed(*promoted, **named)
    assert "already promoted" in printed("models", "promote", "scalp@2", **named)
    rows = [line for line in printed("models", "list", "scalp", **named).splitlines() if "scalp@" in line]
    assert len(rows) == 2
    assert "0.876" in rows[1] or "0.877" in rows[1]
    assert [" by " in row for row in rows] == [False, True]
    assert ["SYNTHETIC" in row for row in rows] == [False, True]

    out = tmp_path / "pulled"
    printed("models", "pull", "models://scalp", out, **named)
    assert load_bundle(str(out)).fetch("weights").spec.name == "second"

    assert "scalp@1" in printed("models", "rollback", "scalp", **named)
    result = scalp("models", "rollback", "scalp", **named)
    assert_error(result, "no version was promoted before the current one (scalp@1)")
    history = storage.names_in(f"{root}/scalp/history")
    assert history == {"000001.json", "000002.json", "000003.json"}
    assert json.loads(storage.read(f"{root}/scalp/history/000002.json"))["why"] == "better"


def test_a_version_that_may_be_worse_than_the_promoted_one_is_refused(pipeline, bundle, tmp_path, capsys):
    root = str(tmp_path / "models")
    trained = load_bundle(str(pipeline.run)).fetch("weights").fetch("float")
    renamed = trained.spec.model_copy(update={"name": "renamed"})
    save_bundle(str(tmp_path / "renamed"), renamed, trained.files)
    for source in (pipeline.run, tmp_path / "renamed", bundle):  # the last one's weights are random
        models.add(str(source), "scalp", root)
    data = str(pipeline.data)

    assert promote("scalp@1", registry=root).evidence is None  # nothing to compare it with
    with pytest.raises(
        UserError, match="scalp@1 is promoted, and scalp@2 was not compared with it; add --data"
    ):
        promote("scalp@2", registry=root)
    with pytest.raises(UserError, match="against scalp@1 .*the loss of kappa is .*may be as"):
        promote("scalp@3", data=data, registry=root)
    with pytest.raises(UserError, match=r"the loss of kappa is 0\.0000, and may be as .*more images"):
        promote("scalp@2", data=data, registry=root)  # alike on too few images

    entry = promote("scalp@2", data=data, max_drop=0.5, registry=root)
    assert "compared with the promoted version" in capsys.readouterr().out
    assert (entry.evidence.against, entry.evidence.same_data) == (1, True)
    assert entry.evidence.against_model == trained.spec.model_version
    tested = manifest.select_split(manifest.read_manifest(str(pipeline.data)), "test")
    assert entry.evidence.comparison.images == tested.num_rows
    assert Registry(root).history("scalp")[-1] == entry

    with pytest.raises(UserError, match="--untested needs --why"):
        promote("scalp@3", untested=True, registry=root)
    assert promote("scalp@3", untested=True, why="a demonstration", registry=root).evidence is None


def test_a_promotion_obeys_the_policy_of_its_model(pipeline, bundle, tmp_path, capsys):
    root, data = str(tmp_path / "models"), str(pipeline.data)
    for source in (pipeline.run, bundle):  # the last one's weights are random
        models.add(str(source), "scalp", root)
    policy = tmp_path / "models/scalp/promotion.yaml"
    fingerprint = manifest.read_spec(data).sha256
    always, never, none_yet = (
        "metric: top1, at_least: -1", "metric: top1, at_least: 1", "metric: top1, max_loss: -1"
    )  # fmt: skip

    def write(data_sha256, *rules):
        policy.write_text(
            "\n".join([f"data: [{data_sha256}]", "rules:", *(f"  - {{{rule}}}" for rule in rules)])
        )

    write("f" * 64, always)
    with pytest.raises(UserError, match="promotion.yaml: data does not list"):
        promote("scalp@1", data=data, registry=root)
    write(fingerprint, always, never)
    for options in ({}, {"data": data, "untested": True, "why": "hurry"}):
        with pytest.raises(UserError, match="promotion.yaml must decide about scalp@1; add --data"):
            promote("scalp@1", registry=root, **options)
    with pytest.raises(UserError, match="promotion.yaml, line 4: top1 at least 1: it is .* and may be"):
        promote("scalp@1", data=data, registry=root)
    assert Registry(root).history("scalp") == []

    write(fingerprint, always, none_yet)
    entry = promote("scalp@1", data=data, registry=root)
    assert "line 4" in capsys.readouterr().out
    assert [result.line for result in entry.policy.results] == [3, 4]
    assert entry.policy.results[1].note == "no version is promoted"
    assert Registry(root).history("scalp") == [entry]
    with pytest.raises(UserError, match="line 4: top1 max loss -1: it is"):
        promote("scalp@2", data=data, max_drop=1, registry=root)
    assert promote("scalp@1", registry=root) == entry  # promoted already: nothing to decide


def test_mistakes_with_models_end_with_an_error(bundle, tmp_path, monkeypatch):
    monkeypatch.delenv("SCALP_MODELS", raising=False)
    assert re.match("error: .*\nhint:  set SCALP_MODELS.*--registry", run_scalp("models", "list").stderr)
    monkeypatch.setenv("SCALP_MODELS", str(tmp_path / "models"))
    assert run_scalp("models", "add", str(bundle), "scalp").returncode == 0
    for words, message in (
        (("promote", "scalp"), "scalp@VERSION"),
        (("promote", "scalp@3"), r"did you mean scalp@1.*All versions: 1"),
        (("add", str(bundle), "a/b"), "'a/b' is not a valid name of a model"),
        (("add", str(tmp_path), "scalp"), "is not a bundle"),
    ):
        refuse(message, "models", *words)
    refuse("did you mean 'scalp'", "serve", "models://scapl", "--port", str(free_port()))
    refuse("do not change.*scalp models add RUN NAME", "quantize", "models://scalp@1", str(tmp_path))


def refuse(message: str, *words: str) -> None:
    refused = run_scalp(*words)
    assert refused.returncode == 2
    assert re.match(rf"error: .*{message}", refused.stderr.replace("\nhint:  ", "; ")), refused.stderr

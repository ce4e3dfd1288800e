"""The model registry: complete versions, history and name resolution, with concurrent writers."""

import re
import signal
import subprocess
import sys
import time
from threading import Barrier

import pytest

from scalp_core import storage
from scalp_core.bundles import registry
from scalp_core.bundles.bundle import BOM_FILE, CARD_FILE, SPEC_FILE
from scalp_core.bundles.contract import GRAPH_FILES, WEIGHTS_FILE
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.registry import Registry, open_registry
from scalp_core.datasets.manifest import SplitSpec
from scalp_core.errors import UserError
from tests.support.threads import at_once


def leaky(bundle):
    training = load_bundle(str(bundle)).spec.training
    split = SplitSpec(method="random", ratio="7:2:1", seed=0, keys=())
    return training.model_copy(update={"split": split})


@pytest.mark.medium
def test_a_version_is_the_whole_bundle_and_is_found_by_its_names(store, run):
    assert store.add(run(1), "scalp") == (1, True)
    assert store.add(run(2), "scalp") == (2, True)
    assert store.names() == ["scalp"]
    held = storage.names_in(store.uri("scalp", 1))
    made = {SPEC_FILE, WEIGHTS_FILE, *GRAPH_FILES["float"], CARD_FILE, BOM_FILE, "curves.png", "claim.json"}
    assert held == made
    store.promote("scalp", 1, untested=True)
    for reference, temperature in (("scalp", 1), ("scalp@2", 2), ("scalp@latest", 2)):
        loaded = load_bundle(f"models://{reference}").fetch("weights").fetch("float")
        assert loaded.spec.temperature == temperature


@pytest.mark.medium
@pytest.mark.promise("README: the same bundle adds no version")
def test_the_same_bundle_again_is_the_same_version(store, run):
    store.add(run(1), "scalp")
    store.add(run(2), "scalp")
    assert store.add("models://scalp@1", "scalp") == (1, False)
    assert store.versions("scalp") == [1, 2]
    assert store.add("models://scalp@1", "other") == (1, True)
    assert load_bundle("models://other@1").spec == load_bundle("models://scalp@1").spec


def test_a_leaky_bundle_is_promoted_only_on_request(store, bundle, run):
    store.add(run(1, training=leaky(bundle)), "scalp")
    with pytest.raises(UserError, match="scalp@1 was trained on a leaky split.*--allow-leaky"):
        store.promote("scalp", 1, untested=True)
    assert store.history("scalp") == []
    assert store.promote("scalp", 1, leaky_too=True, untested=True)[0].model_version.endswith("-leaky")


UNKNOWN = {
    "models://scapl": "no model 'scapl'; did you mean 'scalp'?",
    "models://zzz": "no model 'zzz'; scalp models list --registry",
    "models://scalp@7": "did you mean scalp@2? All versions: 1, 2",
    "models://scalp@-1": "All versions: 1, 2",
    "models://scalp": "no version of scalp is promoted; run scalp models promote scalp@2",
    "models://": "write models://NAME",
    "models://scalp@": "write models://NAME",
    "models://../scalp@1": "write models://NAME",
}


def test_unknown_model_lists_the_known_ones(tmp_path, monkeypatch, run):
    monkeypatch.setenv("SCALP_MODELS", str(tmp_path / "models"))
    store, sources = open_registry(), [run(1), run(2)]
    for source, name in ((sources[0], "scalp"), (sources[1], "scalp"), (sources[0], "hair")):
        store.add(source, name)
    for reference, words in UNKNOWN.items():
        with pytest.raises(UserError, match=re.escape(words)):
            load_bundle(reference)


def test_a_model_is_found_by_its_name_alone(store, run):
    store.add(run(1), "scalp")
    assert store.find_name("scalp") == store.find_name("models://scalp") == "scalp"
    with pytest.raises(UserError, match=r"^scapl: \S+ has no model 'scapl'; did you mean 'scalp'\?"):
        store.find_name("scapl")
    with pytest.raises(UserError, match="^scalp@1 names no model; write the name alone"):
        store.find_name("scalp@1")


def test_missing_and_empty_registries_are_reported_with_advice(tmp_path, monkeypatch):
    monkeypatch.delenv("SCALP_MODELS", raising=False)
    with pytest.raises(UserError, match="set SCALP_MODELS to a folder or s3://BUCKET/PREFIX"):
        load_bundle("models://scalp")
    monkeypatch.setenv("SCALP_MODELS", str(tmp_path / "none"))
    with pytest.raises(UserError, match="holds no models; add one with scalp models add RUN scalp"):
        load_bundle("models://scalp")


def test_a_damaged_file_is_not_copied(store, run):
    source = run(1)
    uri = storage.join(source, "bundle", "model.bin")
    storage.write(uri, storage.read(uri)[:-1] + b"!")
    with pytest.raises(UserError, match="model.bin does not match its sha256"):
        store.add(source, "scalp")
    assert store.names() == []


def test_an_invalid_record_is_refused_with_what_is_wrong_in_it(store, run):
    store.add(run(1), "scalp")
    claim = storage.join(store.uri("scalp", 1), registry.CLAIM_FILE)
    storage.write(claim, b"{}")
    with pytest.raises(UserError) as raised:
        store.add(run(2), "scalp")
    assert str(raised.value).startswith(f"{claim} is not a valid record of the registry (fingerprint: Field ")


KILLED = """
import os, signal, sys
from scalp_core import storage
from scalp_core.bundles.registry import open_registry
write = storage.write
def killed(uri, data):
    if uri.endswith("model.xml"):
        os.kill(os.getpid(), signal.SIGKILL)
    write(uri, data)
storage.write = killed
open_registry().add(sys.argv[1], "scalp")
"""


@pytest.mark.medium
def test_killed_add_leaves_no_visible_version(store, run):
    source = run(1)
    ended = subprocess.run([sys.executable, "-c", KILLED, source], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert "model.bin" in storage.names_in(store.uri("scalp", 1))  # it was in the middle
    assert (store.names(), store.versions("scalp")) == ([], [])
    with pytest.raises(UserError, match="holds no models"):
        load_bundle("models://scalp@1")
    assert store.add(run(2), "scalp") == (2, True)  # the number is not taken by another bundle
    assert store.add(source, "scalp") == (1, True)  # the same one completes it
    assert store.add(source, "scalp") == (1, False)
    assert load_bundle("models://scalp@1").fetch("weights").fetch("float").spec.temperature == 1


@pytest.mark.medium
def test_concurrent_adds_of_one_bundle_share_a_version(store, run):
    sources = [run(1), run(2)]
    files, looked = Registry._files, Barrier(8)

    def slow(name):
        found = files(store, name)
        looked.wait()  # all look before any of them takes a number
        return found

    object.__setattr__(store, "_files", slow)
    added = at_once(8, lambda index: store.add(sources[index % 2], "scalp"))
    object.__delattr__(store, "_files")
    assert store.versions("scalp") == [1, 2]
    for source in (0, 1):
        (version,) = {number for number, _ in added[source::2]}
        assert sum(new for _, new in added[source::2]) == 1  # one of them reports it as new
        loaded = load_bundle(f"models://scalp@{version}").fetch("weights").fetch("float")
        assert loaded.spec.temperature == source + 1


ADDED = """
import sys, time
from scalp_core.bundles.registry import open_registry
time.sleep(max(0, float(sys.argv[2]) - time.time()))
print(*open_registry().add(sys.argv[1], "scalp"))
"""


@pytest.mark.medium
def test_processes_adding_one_bundle_share_a_version(store, run):
    command = [sys.executable, "-c", ADDED, run(1), str(time.time() + 1)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = sorted(process.communicate()[0].strip() for process in started)
    assert printed == ["1 False", "1 True"]
    assert store.versions("scalp") == [1]
    load_bundle("models://scalp@1").fetch("weights").fetch("float")


def test_an_add_overtaken_by_another_of_the_same_bundle_changes_nothing(store, run, monkeypatch):
    source, copy, others = run(1), registry.copy_bundle, []

    def overtaken(bundle, to):
        if not others:
            others.append("begun")
            others[0] = store.add(source, "scalp")
            storage.write(storage.join(source, "bundle", CARD_FILE), b"written since")
        return copy(bundle, to)

    monkeypatch.setattr(registry, "copy_bundle", overtaken)
    assert store.add(source, "scalp") == (1, False)
    assert others == [(1, True)]
    assert storage.read(storage.join(store.uri("scalp", 1), CARD_FILE)) == b"card"
    load_bundle("models://scalp@1").fetch("weights").fetch("float")


def test_numbers_taken_during_a_listing_are_found(store, run):
    sources, files = [run(number) for number in (1, 2)], Registry._files
    for source in sources:
        store.add(source, "scalp")
    listings = iter([lambda found: [pair for pair in found if pair[0] != 1], list])
    object.__setattr__(store, "_files", lambda name: next(listings)(files(store, name)))
    assert store.add(sources[0], "scalp") == (1, False)


@pytest.mark.medium
def test_concurrent_adds_of_different_bundles_get_complete_versions(store, run):
    sources = [run(number) for number in range(1, 4)]
    added = at_once(3, lambda index: store.add(sources[index], "scalp"))
    assert sorted(added) == [(1, True), (2, True), (3, True)]
    for index, (version, _) in enumerate(added):
        loaded = load_bundle(f"models://scalp@{version}").fetch("weights").fetch("float")
        assert loaded.spec.temperature == index + 1


@pytest.mark.promise("README: registries are only added to")
def test_version_in_a_registry_is_immutable(store, run):
    store.add(run(1), "scalp")
    with pytest.raises(UserError, match="those do not change.*scalp models add RUN NAME"):
        registry.refuse_change(load_bundle("models://scalp@1"))
    registry.refuse_change(load_bundle(run(2)))


def test_a_server_that_ignores_the_condition_is_refused(s3, tmp_path, run, monkeypatch):
    from scalp_core.storage import s3 as client

    answer = client.answer

    def careless(operation, **query):
        query.pop("IfNoneMatch", None)
        return answer(operation, **query)

    monkeypatch.setattr(client, "answer", careless)
    monkeypatch.setattr(client, "_conditional", set())  # as in a new process
    store = open_registry(f"s3://scalp/careless/{tmp_path.name}")
    with pytest.raises(UserError, match="ignores `If-None-Match: \\*` and overwrites"):
        store.add(run(1), "scalp")
    assert store.names() == []

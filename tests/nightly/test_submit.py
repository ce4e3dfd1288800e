"""`scalp submit` to a real cluster of several nodes, with a token: each work one job, seen to its end."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
import yaml

from jobs.common.local_executor import LocalExecutor
from jobs.data.prepare import prepare
from jobs.grade.driver import grade
from scalp_core import storage
from scalp_core.bundles.registry import Registry
from scalp_core.curation.audit import Options
from scalp_core.datasets.manifest import image_id
from scalp_core.results.schema import RESULTS_FOLDER
from serving import app
from serving.client import Client
from tests.support.images import jpeg
from tests.support.labels import columns, write_log
from tests.support.nodes import BIN, nodes
from tests.support.ports import free_port
from tests.support.preparing import picture
from tests.support.result_rows import read_results
from tests.support.sizes import SMALL
from tests.support.submitting import SOON, TOKEN, environment, scalp, start

PHOTOGRAPHS = 24

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def far(s3):
    with nodes(workers=1, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) as found:
        yield found


@pytest.fixture(scope="module")
def places(bundle, s3):
    """A bundle and photographs in S3."""
    for file in Path(bundle).iterdir():
        storage.write(f"s3://scalp/far/bundle/{file.name}", file.read_bytes())
    for number in range(PHOTOGRAPHS):
        storage.write(f"s3://scalp/far/photographs/{number:03d}.jpg", jpeg(number))
    return "s3://scalp/far/bundle", "s3://scalp/far/photographs"


def rows(out: str) -> dict[str, tuple]:
    found = read_results(storage.join(out, RESULTS_FOLDER)).to_pylist()
    return {row["uri"]: (row["sha256"], row["grade"], row["probabilities"]) for row in found}


def test_a_grading_gives_the_results_of_this_machine_and_a_second_submit_the_same_job(far, places, cluster):
    bundle, photographs = places
    words = ("submit", "--address", far.url, "grade", bundle, photographs, "s3://scalp/far/out")
    code, printed = scalp(*words)
    assert code == 0, printed
    assert f"{PHOTOGRAPHS}" in printed and " succeeded" in printed
    grade(bundle, photographs, "s3://scalp/far/here")
    assert rows("s3://scalp/far/out") == rows("s3://scalp/far/here")

    (log,) = storage.list_files("s3://scalp/far/out/jobs")
    assert "images" in storage.read(log).decode()
    code, again = scalp(*words)
    assert code == 0 and "attached to it" in again and "--rerun" in again, again
    code, listed = scalp("jobs", "list", "--address", far.url)
    assert len(re.findall(r"scalp-grade-\w+\.\d", listed)) == 1, listed


def test_a_job_that_is_left_alone_goes_on_over_a_lost_node_and_is_found_again(far, places):
    bundle, _ = places
    for number in range(400):
        storage.write(f"s3://scalp/far/many/{number:03d}.jpg", jpeg(number % 8))
    words = ("submit", "--address", far.url, "grade", bundle, "s3://scalp/far/many", "s3://scalp/far/long")
    words += ("--shard-size", "8", "--heatmaps", "0")
    client = start(*words)
    said = ""
    while "grading" not in said:  # until the verb has begun
        line = client.stdout.readline()
        assert line, said
        said += line
    client.send_signal(signal.SIGINT)
    rest, _ = client.communicate(timeout=SOON)
    assert client.returncode == 130 and "detached" in rest, rest
    (id_,) = re.findall(r"scalp jobs logs (\S+);", rest)

    lost = far._processes[1]
    far.end(lost)
    far.add()
    code, printed = scalp(*words)
    assert code == 0 and f"{id_} is " in printed and "attached to it" in printed, printed
    summary = json.loads(storage.read("s3://scalp/far/long/summary.json"))
    assert (summary["rows"], summary["rows_unaccounted"]) == (400, 0)


def test_a_training_comes_out_as_on_this_machine(far, pipeline):
    for file in pipeline.data.rglob("*"):
        if file.is_file():
            storage.write(f"s3://scalp/far/data/{file.relative_to(pipeline.data)}", file.read_bytes())
    settings = [word for each in (f"size={SMALL}", "epochs=4") for word in ("--set", each)]
    # The manifest names photographs on this disk, which both nodes have.
    words = ("train", "s3://scalp/far/data", "s3://scalp/far/run", "--recipe", "smoke", *settings)
    code, printed = scalp("submit", "--address", far.url, *words, "--device", "cpu", "--workers", "2")
    assert code == 0 and "validation QWK" in printed, printed
    summary = json.loads(storage.read("s3://scalp/far/run/summary.json"))
    assert summary["validation"]["qwk"] == pytest.approx(pipeline.trained["validation"]["qwk"], abs=0.02)
    assert "s3://scalp/far/run/bundle/bundle.json" in storage.list_files("s3://scalp/far/run/bundle")


def test_a_round_of_the_loop_adds_the_next_version(far, make_bundle, tmp_path):
    root, rows, answers = "s3://scalp/far/loop", ["uri,label,group"], []
    for index in range(54):
        data, uri = picture(index), f"{root}/{'set' if index < 48 else 'reviewed'}/{index}.jpg"
        storage.write(uri, data)
        if index < 48:
            rows.append(f"{uri},{index % 4},p{index // 2}")
        else:
            digest = sha256(data).hexdigest()
            answers.append(
                columns(str(index), grade=index % 4, uri=uri, sha256=digest, image_id=image_id(digest))
            )
    storage.write(f"{root}/labels.csv", "\n".join(rows).encode())
    prepare(f"{root}/labels.csv", f"{root}/data", Options(), executor=LocalExecutor())
    write_log(f"{root}/labels", answers)
    registry = Registry(f"{root}/registry")
    registry.add(str(make_bundle(tmp_path / "first")), "scalp")
    registry.promote("scalp", 1)
    settings = ("epochs=1", "batch_size=8", "architecture=test_resnet", f"size={SMALL}")
    words = ("submit", "--address", far.url, "improve", "models://scalp", f"{root}/labels", f"{root}/data")
    words += (f"{root}/round", "--device", "cpu", "--promote", "--max-drop", "1")
    words += tuple(word for setting in settings for word in ("--set", setting))
    code, printed = scalp(*words, seconds=300, SCALP_MODELS=registry.root)
    assert code == 0 and "which label 6 new images" in printed, printed
    entry = registry.current("scalp")
    (reviews,) = entry.reviews
    assert (entry.version, reviews.labels, reviews.answers) == (2, f"{root}/labels", 6)


def ready(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def test_an_endpoint_is_deployed_and_answers_as_bulk_grading_does(far, places, tmp_path):
    config = yaml.safe_load((Path(app.__file__).with_name("config.yaml")).read_text())
    config["proxy_location"] = "HeadOnly"  # two nodes of one machine would take the same port
    config["http_options"]["port"] = port = free_port()
    config["applications"][0]["deployments"][0]["user_config"]["bundle"] = places[0]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [str(BIN / "serve"), "deploy", str(tmp_path / "config.yaml"), "-a", far.url]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 120
    while not ready(f"http://127.0.0.1:{port}/readyz"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    with Client(f"http://127.0.0.1:{port}") as client:
        answer = client.grade(jpeg(3))
    _, grade_, probabilities = rows("s3://scalp/far/out")["s3://scalp/far/photographs/003.jpg"]
    assert answer.grade == grade_
    assert answer.probabilities == pytest.approx(probabilities, abs=1e-6)
    # The application goes, and its CPUs are free for what follows.
    command = [str(BIN / "serve"), "shutdown", "-y", "-a", far.url]
    assert subprocess.run(command, capture_output=True, env=environment(), timeout=120).returncode == 0


def test_a_job_is_stopped_and_told(far, places):
    bundle, _ = places
    words = ("grade", bundle, "s3://scalp/far/many", "s3://scalp/far/stopped", "--shard-size", "4")
    code, printed = scalp("submit", "--address", far.url, "--detach", *words)
    assert code == 0, printed
    (id_,) = re.findall(r"submitted (\S+) with", printed)
    code, printed = scalp("jobs", "stop", id_, "--address", far.url)
    assert code == 0 and f"{id_} stopped" in printed, printed
    code, printed = scalp("jobs", "logs", id_, "--address", far.url)
    assert code == 143 and "was stopped; the same command resumes it" in printed, printed


def test_what_the_cluster_can_never_hold_is_told_by_the_job(far, places):
    bundle, photographs = places
    words = ("submit", "--address", far.url, "grade", bundle, photographs, "s3://scalp/far/huge")
    code, printed = scalp(*words, "--replicas", "500")
    assert code == 2 and "room for" in printed and "not for 500" in printed, printed
    assert "waiting for" not in printed  # as for nodes of an autoscaler, for half an hour


def test_a_node_with_other_keys_is_told_before_the_work(far, places):
    bundle, photographs = places
    node = far.add(AWS_SECRET_ACCESS_KEY="wrong")
    far.wait_for_all()
    code, printed = scalp("submit", "--address", far.url, "grade", bundle, photographs, "s3://scalp/far/no")
    far.end(node)
    assert code == 2, printed
    address = f"127.0.0.{len(far._processes) + 1}"
    assert f"error: node {address}: cannot read s3://scalp/far/photographs" in printed, printed
    assert "s3://scalp/far/no" not in {uri.rpartition("/")[0] for uri in storage.list_files("s3://scalp/far")}

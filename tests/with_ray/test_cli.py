"""A user's mistake ends with the problem, the fix, and exit code 2."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import boto3
import pytest
from typer.testing import CliRunner

from jobs.cli.main import app, main
from scalp_core import storage
from scalp_core.models import initial_weights
from scalp_core.storage import s3 as s3_storage
from tests.support.command import run_scalp
from tests.support.images import jpeg
from tests.support.ports import free_port
from tests.support.sources import audited_jpegs


def scalp(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run the real command."""
    command = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | environment, check=False
    )


def assert_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stdout + result.stderr
    assert re.fullmatch(r"error: [^\n]+\n(hint:  [^\n]+\n)?", result.stderr), result.stderr
    message = result.stderr.replace("\nhint:  ", "; ")
    for word in words:
        assert word in message


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg())
    return folder


def test_help_explains_every_verb():
    result = scalp("--help")
    assert result.returncode == 0
    verbs = (
        "synth prepare pseudonymize train tune evaluate quantize grade results explain serve models "
        "bench demo"
    )
    for verb in verbs.split():
        assert verb in result.stdout
        explained = CliRunner().invoke(app, [verb, "--help"])
        assert explained.exit_code == 0, explained.output
        assert f"{verb} [OPTIONS]" in explained.output


@pytest.mark.promise("README: bad input is reported with a fix and exit code 2")
def test_a_missing_folder(bundle, tmp_path):
    missing = tmp_path / "missing"
    for words, way_out in (
        (("grade", bundle, missing, tmp_path / "out"), "check the path"),
        (("prepare", missing, tmp_path / "data"), "check the path"),
        (("train", missing, tmp_path / "run"), "scalp prepare SOURCE"),
        (("evaluate", missing, missing, tmp_path / "out"), "is not a bundle"),
    ):
        assert_error(run_scalp(*words), str(missing), way_out)
    assert not (tmp_path / "out").exists()


def test_a_mistake_that_a_worker_finds_has_the_same_form(cluster, tmp_path):
    (tmp_path / "t.csv").write_text("")
    assert_error(run_scalp("prepare", tmp_path / "t.csv", tmp_path / "data"), "t.csv", "Empty CSV file")


def test_an_unknown_recipe_key(tmp_path):
    result = run_scalp("train", tmp_path, tmp_path / "run", "--recipe", "smoke", "--set", "epoch=1")
    assert_error(result, "unknown key 'epoch'", "did you mean 'epochs'")


def test_a_bundle_with_a_flipped_byte(bundle, photographs, tmp_path):
    damaged = shutil.copytree(bundle, tmp_path / "damaged")
    data = bytearray((damaged / "model.bin").read_bytes())
    data[1_000_000] ^= 1
    (damaged / "model.bin").write_bytes(bytes(data))
    for result in (
        run_scalp("grade", damaged, photographs, tmp_path / "out"),
        run_scalp("serve", damaged, "--port", str(free_port())),
    ):
        assert_error(result, str(damaged), "model.bin", "copy the bundle again")


@pytest.fixture
def read_credentials_again(monkeypatch) -> Iterator[Callable[[], None]]:
    """Make the next access to S3 read the AWS chain, as a new process does."""

    def forget() -> None:
        s3_storage._resolve.cache_clear()
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)

    yield forget
    s3_storage._resolve.cache_clear()


def test_a_wrong_s3_key(bundle, s3, read_credentials_again, tmp_path, monkeypatch):
    storage.write("s3://scalp/cli/a.jpg", jpeg())
    read_credentials_again()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    result = run_scalp("grade", bundle, "s3://scalp/cli", tmp_path / "out")
    assert_error(result, "s3://scalp/cli", "AWS_ACCESS_KEY_ID")
    assert "wrong" not in result.stderr
    assert s3.secret_key not in result.stdout + result.stderr


def test_an_s3_server_that_does_not_answer(bundle, s3, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    result = run_scalp("grade", bundle, "s3://scalp/cli", tmp_path / "out")
    assert_error(result, "did not answer", "AWS_ENDPOINT_URL")


def test_an_address_that_others_could_reach(bundle):
    assert_error(run_scalp("serve", bundle, "--host", "0.0.0.0", "--port", str(free_port())), "0.0.0.0")  # noqa: S104


def test_a_cluster_that_does_not_answer(bundle, photographs, tmp_path):
    result = scalp("grade", bundle, photographs, tmp_path / "out", RAY_ADDRESS="127.0.0.1:9")
    assert_error(result, "RAY_ADDRESS=127.0.0.1:9", "unset RAY_ADDRESS")


def test_unavailable_weights_name_the_options_and_start_nothing(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route to host")

    def refuse(*_):
        raise AssertionError("a training without weights needs no Ray")

    monkeypatch.setattr(initial_weights._hub, "download_cached_file", unreachable)
    monkeypatch.setattr("jobs.train.driver.connect", refuse)
    data = audited_jpegs(tmp_path).data
    result = run_scalp("train", data, tmp_path / "run", "--weights", "imagenet")
    assert_error(result, "--weights FILE", "--weights s3://", "--weights none")
    assert not (tmp_path / "run").exists()


def test_a_stopped_command_prints_how_to_resume(monkeypatch, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.grade.results.results", stop)
    monkeypatch.setattr(sys, "argv", ["scalp", "results", "out"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "scalp: stopped; run the same command again to resume\n"


def test_the_command_itself_is_installed():
    assert shutil.which("scalp", path=os.path.dirname(sys.executable))  # noqa: PTH120


def test_s3_is_reached_by_the_usual_aws_chain(s3, read_credentials_again, tmp_path, monkeypatch):
    """Keys, region and address from the user's AWS files, as boto3 reads them."""
    for index in range(12):
        storage.write(f"s3://scalp/chain/{index % 4}/{index}.jpg", jpeg(index))
    (tmp_path / "credentials").write_text(
        f"[clinic]\naws_access_key_id = {s3.access_key}\naws_secret_access_key = {s3.secret_key}\n"
    )
    (tmp_path / "config").write_text(
        f"[profile clinic]\nregion = eu-central-1\nendpoint_url = {s3.endpoint}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "clinic")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    read_credentials_again()
    result = run_scalp("prepare", "s3://scalp/chain", tmp_path / "out", "--ratio=1:1:1", "--local")
    assert result.returncode == 0, result.stderr
    assert '"photographs": 12' in (tmp_path / "out" / "summary.json").read_text()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert_error(run_scalp("models", "list", "--registry=s3://scalp/chain"), "nobody")

"""Storage errors by code and errno, independent of file names; retries and their log."""

import errno
import logging
import os
import pickle
import threading
import time
from unittest.mock import Mock

import pytest

from scalp_core import storage
from scalp_core.datasets import locations, manifest
from scalp_core.datasets.locations import Location
from scalp_core.errors import UserError
from scalp_core.storage import outputs, retry
from scalp_core.storage import s3 as client
from scalp_core.storage.errors import StorageError, advice, is_transient


def arrow(key: str, code: str, rest: str = "No response body.") -> OSError:
    """As pyarrow's S3 client words an error."""
    place = f"When reading information for key '{key}' in bucket 'b'"
    return OSError(f"{place}: AWS Error {code} during HeadObject operation: {rest}")


@pytest.mark.parametrize(
    ("error", "transient", "words"),
    [
        (arrow("IMG (500).jpg", "ACCESS_DENIED"), False, "access denied"),
        (arrow("timed out SlowDown.jpg", "NO_SUCH_KEY"), False, "does not exist"),
        (
            arrow("a", "NETWORK_CONNECTION", "curlCode: 77, Problem with the SSL CA cert"),
            False,
            "certificate",
        ),
        (arrow("a", "NETWORK_CONNECTION", "curlCode: 60, SSL peer certificate"), False, "certificate"),
        (arrow("a", "NETWORK_CONNECTION", "curlCode: 7, Couldn't connect to server"), True, "did not answer"),
        (arrow("a", "UNKNOWN (HTTP status 503)"), True, "did not answer"),
        (StorageError("x", "SlowDown", 503), True, "throttles"),
        (StorageError("x", "SignatureDoesNotMatch", 403), False, "refused the key"),
        (StorageError("Not Found", "404", 404), False, "does not exist"),
        (StorageError("x", "SSLError"), False, "certificate"),
        (OSError(errno.EIO, "I/O error", "scan (503).jpg"), False, "input/output error"),
        (OSError(errno.ENOSPC, "No space left on device"), False, "disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "timeout.jpg"), False, "permission denied"),
    ],
)
def test_an_error_is_told_apart_by_its_code_whatever_the_file_is_called(error, transient, words, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert is_transient(error) is transient
    assert words in advice(error)


@pytest.mark.parametrize("name", ["scan (403).csv", "SlowDown (503).csv", "NoSuchBucket.csv"])
def test_a_missing_local_file_is_missing_whatever_it_is_called(tmp_path, name):
    with pytest.raises(UserError, match="it does not exist; check the path"):
        storage.read(str(tmp_path / name))


def test_a_damaged_parquet_is_no_damaged_archive(tmp_path):
    from scalp_core.storage import parquet

    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(UserError) as raised:
        parquet.dataset(str(tmp_path / "a.parquet"))
    assert "archive" not in str(raised.value)


def test_a_wrong_key_a_missing_bucket_and_a_missing_object_are_told_apart(s3, monkeypatch):
    with pytest.raises(UserError, match="the bucket does not exist"):
        storage.read("s3://no-such-bucket/a (403)")
    with pytest.raises(UserError, match="it does not exist"):
        storage.read("s3://scalp/no such (500).jpg")
    assert not storage.exists("s3://scalp/no such (500).jpg")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
    for call in (storage.read, storage.exists, storage.is_file, storage.list_files):
        with pytest.raises(UserError, match="refused the key"):
            call("s3://scalp/a")


def test_a_refusal_names_the_credentials_in_use(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    profiles = tmp_path / "credentials"
    profiles.write_text("[clinic]\naws_access_key_id = AKIAEXAMPLE\naws_secret_access_key = secret\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profiles))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    denied = StorageError("no", "AccessDenied", 403)
    assert advice(denied).startswith("access denied: no S3 credentials were found; ")
    monkeypatch.setenv("AWS_PROFILE", "clinic")
    assert "the credentials in use (profile clinic) need s3:ListBucket, s3:GetObject" in advice(denied)
    assert "refused the key of profile clinic;" in advice(StorageError("no", "SignatureDoesNotMatch", 403))
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert advice(denied).startswith("access denied: no S3 credentials were found; ")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.delenv("AWS_PROFILE")
    assert "(AWS_ACCESS_KEY_ID of the environment)" in advice(denied)
    assert "AKIA" not in advice(denied)


def test_an_error_of_a_file_that_scalp_knows_names_what_the_user_gave(tmp_path, monkeypatch):
    def denied() -> None:
        raise StorageError("Forbidden", "AccessDenied", 403)

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr(client, "client", denied)
    for read in (manifest.read_spec, lambda uri: outputs.check_claim(uri, "grade")):
        with pytest.raises(UserError, match="^cannot read s3://clinic/2024: access denied") as raised:
            read("s3://clinic/2024")
        assert isinstance(raised.value.__cause__, StorageError)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "localhost:9000", "http://my_server:9000"])
def test_an_endpoint_that_is_not_a_url_is_named_with_its_fix(monkeypatch, endpoint):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(UserError, match=f"^the S3 endpoint {endpoint} .*; write http://HOST:PORT"):
        storage.exists("s3://clinic/2024")


def test_a_coded_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(StorageError("text", "SlowDown", 503)))  # noqa: S301
    assert (str(error), error.code, error.status) == ("text", "SlowDown", 503)
    assert is_transient(error)


# --- retries -----------------------------------------------------------------------------------------------


class Request:
    """Fails a number of times, each after some seconds at work."""

    def __init__(self, failures: int, seconds: float = 0) -> None:
        self.failures, self.seconds, self.calls = failures, seconds, 0

    def __call__(self) -> str:
        self.calls += 1
        time.sleep(self.seconds)
        if self.calls <= self.failures:
            raise StorageError("away", "EndpointConnectionError")
        return "done"


@pytest.mark.medium
def test_an_outage_after_long_work_is_retried():
    request = Request(failures=1, seconds=0.6)
    with storage.retry_timeout(0.5):
        assert storage.call_with_retries("s3://b/k", request) == "done"


@pytest.mark.medium
@pytest.mark.parametrize(("seconds", "level"), [(60, "WARNING"), (3, "INFO")])
def test_a_job_that_waits_says_so_once(caplog, seconds, level):
    with storage.retry_timeout(seconds), caplog.at_level(logging.INFO):
        assert storage.call_with_retries("s3://b/k", Request(failures=3)) == "done"
    ((name, levelno, text),) = caplog.record_tuples
    assert (name, logging.getLevelName(levelno)) == ("scalp_core.storage.retry", level)
    assert text == f"s3://b/k: EndpointConnectionError; retrying for {seconds} s"


@pytest.mark.medium
def test_a_retry_ends_and_a_permanent_error_is_not_retried():
    request = Request(failures=10**9)
    with storage.retry_timeout(0.5), pytest.raises(StorageError):
        storage.call_with_retries("s3://b/k", request)
    assert 1 < request.calls < 50

    def denied():
        calls.append(1)
        raise StorageError("no", "AccessDenied", 403)

    calls: list[int] = []
    with storage.retry_timeout(60), pytest.raises(StorageError):
        storage.call_with_retries("s3://b/k", denied)
    assert len(calls) == 1


def test_overlapping_blocks_of_threads_leave_nothing_behind():
    inside, leave = threading.Event(), threading.Event()

    def first():
        with storage.retry_timeout(180):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    with storage.retry_timeout(5):
        assert retry.current_retry_timeout() == 5
        leave.set()
        thread.join()
        assert retry.current_retry_timeout() == 5
    assert retry.current_retry_timeout() == retry._DEFAULT_S


def test_threads_that_a_block_starts_wait_as_long_as_it():
    seen = []
    with storage.retry_timeout(180):
        thread = threading.Thread(target=lambda: seen.append(retry.current_retry_timeout()))
        thread.start()
        thread.join()
    assert seen == [180]


# --- names -------------------------------------------------------------------------------------------------


def test_keys_with_empty_segments_are_listed_once(monkeypatch):
    """Amazon's S3 keeps `a//y.jpg` and `a/y.jpg` apart, SeaweedFS does not: the answers are made up."""
    keys = ["a/x.jpg", "a//y.jpg", "a///z.jpg", "b/w.jpg"]

    def answer(operation, Prefix="", Delimiter=None, **query):  # noqa: N803
        assert operation == "list_objects_v2"
        below = [key for key in keys if key.startswith(Prefix)]
        heads = {key: key[len(Prefix) :].partition("/") for key in below}
        folders = sorted({Prefix + head + "/" for head, slash, _ in heads.values() if slash and Delimiter})
        files = [key for key in below if not (Delimiter and heads[key][1])]
        contents = [{"Key": key, "Size": 1, "ETag": key} for key in files]
        prefixes = [{"Prefix": name} for name in folders]
        return {"KeyCount": len(below), "Contents": contents, "CommonPrefixes": prefixes}

    monkeypatch.setattr(client, "answer", answer)
    monkeypatch.setattr(client, "head", Mock(return_value=None))
    listed = [f"s3://bucket/{key}" for key in sorted(keys)]
    assert storage.list_files("s3://bucket") == listed
    by_folder, level = [], ["s3://bucket"]
    while level:
        pages = [page for folder in level for page in storage.list_children(folder)]
        by_folder += [file.uri for files, _ in pages for file in files]
        level = [folder for _, folders in pages for folder in folders]
    assert sorted(by_folder) == listed
    assert sorted(file.uri for file in storage.walk("s3://bucket/a/")) == listed[:2]


def test_a_key_that_pyarrow_refuses_is_read(s3, tmp_path):
    uri = f"s3://scalp/odd/{tmp_path.name}//y.jpg"
    storage.write(uri, b"content")
    (data,) = locations.read_images([Location(uri)], 1000)
    assert data == storage.read(uri) == b"content"
    assert storage.read_range(uri, 2, 3) == b"nte"
    assert storage.read_range(uri, 100, 3) == b""
    (missing,) = locations.read_images([Location(f"{uri}.none")], 1000)
    assert missing.code == "not_found"


def test_a_dangling_link_is_listed(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "annex.jpg").symlink_to(tmp_path / ".git" / "annex" / "objects" / "MD5E-s1")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    for files in (list(storage.walk(str(tmp_path))), next(iter(storage.list_children(str(tmp_path))))[0]):
        sizes = {file.uri.rsplit("/", 1)[-1]: file.size for file in files}
        assert sizes == {"a.jpg": 1, "annex.jpg": None, "loop.jpg": None}


def test_a_changed_file_has_another_version(s3, tmp_path):
    for place in (str(tmp_path), f"s3://scalp/version/{tmp_path.name}"):
        versions = []
        for content in (b"one", b"one", b"two"):
            storage.write(f"{place}/a.tar", content)
            ((file),) = storage.walk(place)
            versions.append(file.version)
        assert versions[2] not in versions[:2]


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """After a power cut a renamed file that was not synced may be empty."""
    steps = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: steps.append("sync") or fsync(number))
    monkeypatch.setattr(
        type(tmp_path), "replace", lambda path, to: steps.append("rename") or replace(path, to)
    )
    storage.write(str(tmp_path / "a"), b"1")
    with storage.new_file(str(tmp_path / "b")) as file:
        file.write(b"2")
    assert steps == ["sync", "rename", "sync"] * 2

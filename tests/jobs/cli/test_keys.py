"""`scalp keys new` as a command: its line admits its key to the endpoint, and the key is stored nowhere."""

from __future__ import annotations

import asyncio
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from serving.admission.limits import Load
from serving.api.routes import create_api
from serving.auth.keys import KeySettings
from serving.http.problems import Refusal
from serving.replicas.ingress import replica
from serving.settings import Settings
from tests.support.command import run_scalp


async def _answer(*_: object) -> None:
    raise Refusal(418, "was_let_in", "the request reached the model")


def status(keys: Path, key: str | None, path: str = "/v1/grade") -> int:
    """Status of a request to an endpoint with a key file; 418 if it passes the authorization."""
    settings = Settings(keys=KeySettings(file=str(keys)))
    api = create_api(settings, Load(settings.limits), None)
    stub = SimpleNamespace(grade=_answer, bulk=SimpleNamespace(start=_answer))
    api.dependency_overrides[replica] = lambda: stub
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"json": {"source": "s3://clinic-7/a"}} if path == "/v1/bulk" else {"files": {"file": b"x"}}

    async def send() -> int:
        transport = httpx.ASGITransport(api, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.post(path, headers=headers, **body)).status_code

    return asyncio.run(send())


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Working directory, home and temporary directory of a user, empty."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    for variable in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(variable, str(home))
    monkeypatch.setattr(tempfile, "tempdir", None)  # read TMPDIR again
    return home


def make_key(*options: str) -> tuple[str, str]:
    """Key and line that `scalp keys new clinic-7` prints."""
    done = run_scalp("keys", "new", "clinic-7", *options)
    assert (done.returncode, done.stderr) == (0, "")
    key, line = (printed.split(":", 1)[1].strip() for printed in done.stdout.splitlines())
    return key, line


def test_line_that_keys_new_prints_admits_its_key_and_no_other(home):
    (first, line), (second, _) = make_key(), make_key()
    keys = home / "keys.txt"
    keys.write_text(f"# of the clinics\n{line}\n")
    keys.chmod(0o600)
    assert status(keys, first) == 418
    assert status(keys, first, "/v1/bulk") == 403  # without a scope, a key allows to grade alone
    for other in (None, second, line, line.split("sha256:")[1], first[:-1]):
        assert status(keys, other) == 401


def test_scopes_of_keys_new_are_those_of_the_key(home):
    key, line = make_key("--scope", "bulk:s3://clinic-7", "--days", "30")
    keys = home / "keys.txt"
    keys.write_text(f"{line}\n")
    keys.chmod(0o600)
    assert status(keys, key, "/v1/bulk") == 418
    assert status(keys, key) == 403


def test_key_is_long_random_and_stored_nowhere(home, caplog):
    with caplog.at_level(0):
        keys = [make_key() for _ in range(5)]
    assert list(home.rglob("*")) == []
    for key, line in keys:
        assert re.fullmatch(r"scalp_[\w-]{43}", key)  # 256 bits
        assert key not in line and key.removeprefix("scalp_") not in line
        assert key not in caplog.text
    assert len({key for key, _ in keys}) == len({line for _, line in keys}) == 5


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("clinic 7",), "clinic 7"),
        (("clinic-7", "--scope", "bulk"), "--scope bulk"),
        (("clinic-7", "--expires", "2020-01-01"), "--expires 2020-01-01"),
        (("clinic-7", "--expires", "2020-13-01"), "--expires 2020-13-01"),
    ],
)
def test_invalid_request_for_a_key_ends_without_a_key(words, named):
    done = run_scalp("keys", "new", *words)
    assert (done.returncode, done.stdout) == (2, "")
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ") and named in error and hint.startswith("hint:  ")

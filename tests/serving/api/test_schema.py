"""What /openapi.json says of the endpoint holds, whatever is sent: schemathesis makes the requests."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from cluster.haproxy import BATCH_PATH, Policy
from serving.auth.keys import KeySettings, new_key
from serving.auth.scopes import Rights
from serving.schemas.bulk import BulkSettings
from serving.schemas.review import ReviewSettings
from serving.settings import Settings
from tests.serving.api.test_bulk import Client, replace_ray
from tests.support.examples import examples
from tests.support.haproxy_process import running
from tests.support.replica import serve
from tests.support.reviewing import write_run

# Refused requests would say nothing of the routes.
UNLIMITED = Policy(
    requests_per_minute=10**6, burst=10**6, wrong_keys_per_minute=10**6, open_requests_per_minute=10**6
)
# That a file must be a photograph, and a source lie below an allowed prefix, no schema can say.
NOT_SAID = "positive_data_acceptance"
# In a batch a bad photograph is a line of the answer.
A_LINE = "negative_data_rejection"


@pytest.fixture(scope="module")
def key() -> tuple[str, str]:
    """A key that may do everything, and its line in the file."""
    return new_key("root", Rights(admin=True))


@pytest.fixture(scope="module")
def address(bundle: Path, key: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of HAProxy in front of the application."""
    folder = tmp_path_factory.mktemp("schema")
    (folder / "source").mkdir()
    bulk = BulkSettings(sources=[str(folder / "source")], out=str(folder / "out"))
    review = ReviewSettings(graded=write_run(folder / "run", 4), labels=str(folder / "labels"))
    (folder / "keys").write_text(key[1])
    (folder / "keys").chmod(0o600)
    keys = KeySettings(file=str(folder / "keys"))
    settings = Settings(device="cpu", precision="fp32", bulk=bulk, keys=keys, review=review)
    servers: list[uvicorn.Server] = []
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as listener:
        replace_ray(patch, Client())
        thread = threading.Thread(target=lambda: asyncio.run(serve(bundle, settings, listener, servers)))
        thread.start()
        with running(folder, UNLIMITED, listener.getsockname()[1]) as proxy:
            yield f"http://127.0.0.1:{proxy.port}"
        servers[0].should_exit = True
        thread.join()


@pytest.mark.parametrize(
    ("which", "left_out"),
    [("--exclude-path", NOT_SAID), ("--include-path", f"{NOT_SAID},{A_LINE}")],
    ids=["one answer", "a batch"],
)
def test_every_answer_is_as_it_is_described(address, key, which, left_out, tmp_path):
    command = [str(Path(sys.executable).with_name("st")), "run", f"{address}/openapi.json", which, BATCH_PATH]
    command += ["--header", f"Authorization: Bearer {key[0]}"]
    command += ["--exclude-checks", left_out, "--seed", "1", "--no-color"]
    command += ["--max-examples", str(examples(5, 100))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout

"""What /openapi.json says of the endpoint holds, whatever is sent: schemathesis makes the requests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.haproxy import BATCH_PATH
from serving.schemas.bulk import BulkSettings
from serving.settings import Settings
from tests.support.served import scalp_serve

# That a file must be a photograph, and a source lie below an allowed prefix, no schema can say.
NOT_SAID = "positive_data_acceptance"
# In a batch a bad photograph is a line of the answer.
A_LINE = "negative_data_rejection"


@pytest.fixture(scope="module")
def address(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An endpoint without bulk runs: what schemathesis finds there it would stop and start again."""
    folder = tmp_path_factory.mktemp("schema")
    (folder / "source").mkdir()
    settings = Settings(
        device="cpu",
        precision="fp32",
        bulk=BulkSettings(sources=[str(folder / "source")], out=str(folder / "out")),
    )
    with scalp_serve(bundle, settings, folder) as served:
        yield served.origin


@pytest.mark.parametrize(
    ("which", "left_out"),
    [("--exclude-path", NOT_SAID), ("--include-path", f"{NOT_SAID},{A_LINE}")],
    ids=["one answer", "a batch"],
)
def test_every_answer_is_as_it_is_described(address, which, left_out, tmp_path):
    command = [str(Path(sys.executable).with_name("st")), "run", f"{address}/openapi.json", which, BATCH_PATH]
    command += ["--exclude-checks", left_out, "--max-examples", "30", "--seed", "1", "--no-color"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout

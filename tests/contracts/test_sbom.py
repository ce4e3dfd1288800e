"""`make sbom`: valid bills of all locked packages, equal each time, silent about this machine."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.bills import errors

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
# Host of a registry that only this machine knows.
_REGISTRY = "registry.invalid"


@pytest.fixture(scope="module", params=["requirements.lock", "requirements-run.lock"])
def bills(request, tmp_path_factory):
    """The lock, and two bills of it, made by the command of the Makefile."""
    (options,) = re.findall(r"^SBOM := python (.*)$", MAKEFILE, re.M)
    (output,) = re.findall(rf"^\t@\$\(BIN\)/\$\(SBOM\) --output-file (\S+) {request.param}$", MAKEFILE, re.M)
    assert output.startswith("build/")
    config = tmp_path_factory.mktemp("pip") / "pip.conf"
    config.write_text(f"[global]\nindex-url = https://{_REGISTRY}/simple\n")
    names = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "UV_INDEX_URL", "UV_DEFAULT_INDEX")
    environment = os.environ | dict.fromkeys(names, f"https://{_REGISTRY}/simple")
    made = []
    for name in ("first", "second"):
        file = tmp_path_factory.mktemp(name) / "sbom.json"
        command = [sys.executable, *options.split(), "--output-file", str(file), request.param]
        subprocess.run(
            command,
            cwd=ROOT,
            env=environment | {"PIP_CONFIG_FILE": str(config)},
            check=True,
            capture_output=True,
        )
        made.append(file.read_text())
    return (ROOT / request.param).read_text(), made


def test_a_bill_is_valid_and_has_each_locked_package(bills):
    lock, (bill, again) = bills
    assert errors(json.loads(bill)) == []
    assert again == bill
    locked = set(re.findall(r"^([a-z0-9.-]+)==([^ ;]+)", lock, re.M))
    assert {(each["name"], each["version"]) for each in json.loads(bill)["components"]} == locked
    assert len(locked) > 100


def test_a_bill_names_neither_this_machine_nor_its_registry(bills):
    _, (bill, _) = bills
    assert str(ROOT) not in bill
    assert str(Path.home()) not in bill
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", bill)
    assert _REGISTRY not in bill

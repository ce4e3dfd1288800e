"""Irregular files do not crash, hang or exhaust memory: each is graded or refused with its code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scalp_core.errors import ImageError
from scalp_core.images.preprocess import Preprocess, decode
from tests.support.examples import examples
from tests.support.odd_files import sound_files

MEMORY_MIB = 1500
SECONDS_A_FILE = 10
# Codes that bytes can have; the others of IMAGE_CODES are about storage and archives, or are bugs.
REFUSALS = {
    "empty", "not_an_image", "unsupported_format", "unsupported_mode", "too_many_pixels", "too_many_scans",
    "truncated", "corrupt",
}  # fmt: skip

# Decodes the whole corpus. Prints outcome, allowed outcomes and seconds per file, and the peak of memory.
PROGRAM = """
import json, signal, time
from pathlib import Path
from scalp_core.errors import ImageError
from scalp_core.images.preprocess import Preprocess, decode
from tests.support.odd_files import corpus
files, spec, found = corpus(), Preprocess(size=224), {}
for name, (data, allowed) in files.items():
    signal.alarm(60)  # a hang ends the process, and the test with it
    started = time.monotonic()
    try:
        square = decode(data, spec).pixels
        outcome = "graded" if square.shape == (224, 224, 3) else str(square.shape)
    except ImageError as error:
        outcome = error.code
    found[name] = (outcome, sorted(allowed), time.monotonic() - started)
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
print(json.dumps({"found": found, "peak_mib": int(peak.split()[1]) / 1024}))
"""


@pytest.fixture(scope="module")
def report():
    # In a separate process, for its peak memory, and because a crash of a decoder would end this one.
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "PYTHONFAULTHANDLER": "1"}
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.mark.medium
@pytest.mark.promise("README: a damaged file is never half graded")
def test_every_file_is_graded_or_refused_as_it_should_be(report):
    assert len(report["found"]) >= 200
    found = report["found"].items()
    wrong = {name: outcome for name, (outcome, allowed, _) in found if outcome not in allowed}
    assert wrong == {}


@pytest.mark.medium
def test_no_file_takes_long_or_much_memory(report):
    slow = {name: seconds for name, (*_, seconds) in report["found"].items() if seconds > SECONDS_A_FILE}
    assert slow == {}
    assert report["peak_mib"] < MEMORY_MIB


@settings(max_examples=examples(400, 2000), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from(sorted(sound_files())),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=12),
    kept=st.one_of(st.just(1.0), st.floats(0, 1)),
    tail=st.binary(max_size=64),
)
def test_any_damage_is_graded_or_refused(kind, edits, kept, tail):
    data = bytearray(sound_files()[kind])
    for place, value in edits:
        data[int(place * len(data))] = value
    try:
        square = decode(bytes(data[: int(kept * len(data))]) + tail, Preprocess(size=64)).pixels
    except ImageError as error:
        assert error.code in REFUSALS
    else:
        assert square.shape == (64, 64, 3)
        assert square.dtype == np.uint8

"""`scalp grade` and `scalp train` in one process resume after a crash; one bad image costs one row."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.images import jpeg
from tests.support.sources import audited_jpegs

# Decoding an image that ends with CRASH ends the process, as a defect of a native decoder would.
CRASHING = """
import os, signal, sys
from jobs.common import images
from jobs.cli.main import run

decode = images.decode

def crash(data, spec):
    if data.endswith(b"CRASH"):
        os.kill(os.getpid(), signal.{signal})
    return decode(data, spec)

images.decode = crash
if __name__ == "__main__":
    run()
"""


def grade(script: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), "grade", *map(str, words), "--local", "--heatmaps", "0"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


@pytest.fixture
def clinic(tmp_path):
    """Twelve images; a decoder crashes on two of them."""
    folder = tmp_path / "clinic"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02d}.jpg").write_bytes(jpeg(number) + b"CRASH" * (number in (3, 9)))
    return folder


def test_images_that_crash_the_process_are_failed_rows(bundle, clinic, tmp_path):
    script = tmp_path / "crashing.py"
    script.write_text(CRASHING.format(signal="SIGSEGV"))
    ended = grade(script, bundle, clinic, tmp_path / "out", "--shard-size", 2)
    assert ended.returncode == 0, ended.stderr
    assert "the process ended by SIGSEGV; resuming" in ended.stderr
    rows = pq.read_table(tmp_path / "out/results").to_pylist()
    assert len(rows) == len({row["uri"] for row in rows}) == 12
    codes = {Path(row["uri"]).name: row["error_code"] for row in rows if row["error_code"]}
    assert codes == {"03.jpg": "crashed", "09.jpg": "crashed"}
    assert json.loads((tmp_path / "out/summary.json").read_text())["rows_unaccounted"] == 0


def test_a_process_that_crashes_without_a_result_ends_the_command(bundle, clinic, tmp_path):
    script = tmp_path / "crashing.py"
    die = "shards.GradeShard._logits = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
    text = CRASHING.replace("images.decode = crash", f"from jobs.grade import shards\n{die}")
    script.write_text(text.format(signal="SIGKILL"))
    ended = grade(script, bundle, clinic, tmp_path / "out")
    assert ended.returncode == 2
    problem, fix = ended.stderr.strip().splitlines()[-2:]
    assert problem == "error: the process ended 4 times by SIGKILL without a result"
    assert fix.startswith("hint:  if memory ran out")


def test_an_ended_command_leaves_no_process(bundle, clinic, tmp_path):
    script = tmp_path / "waiting.py"
    script.write_text(CRASHING.format(signal="SIGSTOP"))
    words = [bundle, clinic, tmp_path / "out", "--local"]
    command = [sys.executable, str(script), "grade", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    child = _stopped_child(process.pid)
    process.kill()
    process.wait(10)
    _wait_until(lambda: not Path(f"/proc/{child}").exists())
    assert process.returncode == -signal.SIGKILL


def _stopped_child(parent: int) -> int:
    """The child of a process, once it is stopped."""
    found: list[int] = []

    def is_stopped() -> bool:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        states = {child: Path(f"/proc/{child}/status").read_text() for child in children}
        found[:] = [int(child) for child, state in states.items() if "State:\tT" in state]
        return bool(found)

    _wait_until(is_stopped)
    return found[0]


def _wait_until(condition) -> None:
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_interrupt_does_not_wait_for_storage(bundle, clinic, tmp_path):
    script = tmp_path / "stalled.py"
    # While the model loads, a library may lose an interrupt: wait until the main thread waits for images.
    stall = (
        "import threading, time; main = threading.main_thread().ident\n"
        "        while sys._current_frames()[main].f_code.co_name != 'wait': time.sleep(0.05)\n"
        "        print('stalled', flush=True); time.sleep(600)"
    )
    script.write_text(
        CRASHING.format(signal="SIGSEGV").replace("os.kill(os.getpid(), signal.SIGSEGV)", stall)
    )
    words = [bundle, clinic, tmp_path / "out", "--local"]
    command = [sys.executable, str(script), "grade", *map(str, words)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout
    while "stalled" not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends Ctrl-C
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to resume" in errors


# The first process of the command ends by SIGKILL after its first epoch, as if memory ran out.
DYING = """
import os, signal
from pathlib import Path
from jobs.cli.main import run
from jobs.train import worker

report, mark = worker._Worker._report, Path({mark!r})

def die(self, entry):
    if entry["epoch"] == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    report(self, entry)

worker._Worker._report = die
if __name__ == "__main__":
    run()
"""


def test_a_training_that_crashes_without_a_checkpoint_ends_with_its_own_hint(tmp_path):
    script = tmp_path / "dying.py"
    die = "driver.train = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)"
    script.write_text(
        "import os, signal\nfrom jobs.cli.main import run\nfrom jobs.train import driver\n"
        f"{die}\nif __name__ == '__main__':\n    run()\n"
    )
    command = [sys.executable, str(script), "train", "data", str(tmp_path / "run"), "--local"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert ended.returncode == 2
    assert "error: the process ended 4 times by SIGKILL without a result" in ended.stderr
    assert "hint:  if memory ran out, train in another RUN with --set accumulate=2" in ended.stderr


@pytest.mark.promise("docs/training.md: a training in one process resumes after a crash")
def test_a_training_in_one_process_resumes_after_a_crash_and_starts_no_ray(tmp_path):
    data = audited_jpegs(tmp_path / "data", 48).data
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(mark=str(tmp_path / "died")))
    words = ["--recipe", "smoke", "--set", "size=32", "--set", "epochs=3", "--set", "batch_size=8"]
    words += ["--set", "architecture=test_resnet", "--device", "cpu"]
    command = [sys.executable, str(script), "train", data, str(tmp_path / "run"), *words]
    variables = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, env=variables)
    assert ended.returncode == 0, ended.stderr
    assert "the process ended by SIGKILL; resuming" in ended.stderr
    assert "resuming after epoch 1, workers: 1" in ended.stdout
    assert "images are decoded once into memory" in ended.stdout and "Ray" not in ended.stdout
    history = json.loads((tmp_path / "run/summary.json").read_text())["history"]
    assert [entry["epoch"] for entry in history] == [1, 2, 3]

"""`scalp submit` against a job server in this process: one job per command, its log, exit code and Ctrl-C."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import typer

from cluster.jobs_api import Job
from jobs.cli import main as cli
from jobs.common import provenance
from jobs.common.interrupt import INTERRUPTED, Detached
from jobs.submit import driver, logs
from jobs.submit.driver import submit, work_id
from scalp_core.bundles import signing
from scalp_core.bundles.registry import ENVIRONMENT as REGISTRY
from scalp_core.errors import UserError

ADDRESS = "http://127.0.0.1:8265"
SCALP = typer.main.get_command(cli.app)
GRADE = ["grade", "s3://clinic/bundle", "s3://clinic/photographs", "s3://clinic/graded"]
LINES = [f"graded {number} of 6\n" for number in range(1, 7)]
PACKAGES = driver._PACKAGES


class JobServer:
    """The jobs of a cluster, with the methods of `cluster.jobs_api.Jobs`.

    Each connection to a running job's log delivers `LINES` up to the next number of `deliveries`; after the
    last one, the job ends with `end`.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.submissions: list[dict[str, Any]] = []
        self.stopped: list[str] = []
        self.deliveries = [len(LINES)]
        self.interrupted = False
        self.end = ("SUCCEEDED", 0, "")

    def __call__(self, address: str | None) -> JobServer:
        assert address == ADDRESS
        return self

    def last(self, work: str) -> Job | None:
        attempts = [job for job in self.jobs.values() if job.work == work]
        return max(attempts, key=lambda job: job.attempt, default=None)

    def get(self, id_: str) -> Job:
        return self.jobs[id_]

    def submit(self, id_: str, entrypoint: str, metadata: Any, runtime_env: Any, **_: Any) -> None:
        folder = Path(runtime_env["working_dir"])
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        versions = json.loads((folder / "versions.json").read_text())
        self.submissions.append(
            {"entrypoint": entrypoint, "files": files, "versions": versions, **runtime_env, **metadata}
        )
        self.put(id_, "RUNNING")

    def put(self, id_: str, status: str, exit_code: int | None = None, message: str = "") -> None:
        self.jobs[id_] = Job(
            type="SUBMISSION",
            submission_id=id_,
            status=status,
            entrypoint="x",
            message=message,
            driver_exit_code=exit_code,
        )

    def stop_job(self, id_: str) -> None:
        self.stopped.append(id_)

    async def tail_job_logs(self, id_: str) -> AsyncIterator[str]:
        if self.interrupted:
            raise KeyboardInterrupt
        for line in LINES[: self.deliveries.pop(0)]:
            yield line
        if not self.deliveries:
            self.put(id_, *self.end)
        raise ConnectionError("the connection is broken")

    def get_job_logs(self, _: str) -> str:
        return "".join(LINES)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> JobServer:
    server = JobServer()
    monkeypatch.setattr(driver, "Jobs", server)
    monkeypatch.setattr(logs, "_POLL_INTERVAL_S", 0.0)
    monkeypatch.setattr(driver, "_PACKAGES", ("cluster",))  # all have hundreds of files to copy
    return server


def run(*words: str, **options: Any) -> int:
    return submit(ADDRESS, words or GRADE, SCALP, **options)


@pytest.mark.promise("README: the same command is one job")
@pytest.mark.parametrize("status", ["PENDING", "RUNNING", "SUCCEEDED"])
def test_the_same_command_attaches_to_its_job(server, capsys, status):
    assert run(attach=False) == 0
    (id_,) = server.jobs
    server.put(id_, status)
    assert run(attach=False) == 0
    assert list(server.jobs) == [id_] == [f"{work_id(GRADE)}.1"]
    assert "attached to it" in capsys.readouterr().out


@pytest.mark.parametrize(("status", "again"), [("FAILED", False), ("STOPPED", False), ("SUCCEEDED", True)])
def test_an_ended_command_becomes_the_next_attempt(server, status, again):
    server.put(f"{work_id(GRADE)}.1", status)
    run(attach=False, again=again)
    assert list(server.jobs) == [f"{work_id(GRADE)}.1", f"{work_id(GRADE)}.2"]


def test_another_command_is_another_job(server):
    run(attach=False)
    run(*GRADE[:-1], "s3://clinic/again", attach=False)
    assert len(server.jobs) == len(server.submissions) == 2


def test_a_job_gets_the_code_and_versions_of_this_checkout_and_stores_its_log_in_the_output(
    server, monkeypatch
):
    monkeypatch.setattr(driver, "_PACKAGES", PACKAGES)
    run(attach=False, env=("STAGE=night",))
    (job,) = server.submissions
    assert {"jobs/cli/main.py", "serving/web/page.html", "cluster/local.py"} <= job["files"]
    assert "scalp_core/bundles/model_card.md.jinja" in job["files"]
    assert job["versions"] == provenance.versions()
    assert (job["env_vars"]["STAGE"], job["command"]) == ("night", shlex.join(GRADE))
    log = f"s3://clinic/graded/jobs/{work_id(GRADE)}.1.log"
    assert shlex.split(job["entrypoint"])[1:] == [
        "-m",
        "jobs.submit.entry",
        "--log",
        log,
        "--versions",
        "versions.json",
        *GRADE,
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["grade", "s3://clinic/bundle", "s3://clinic/a", "s3://clinic/b", "-o", "s3://clinic/out"],
        ["improve", "models://scalp", "s3://clinic/labels", "s3://clinic/data", "s3://clinic/out"],
    ],
    ids=lambda words: words[0],
)
def test_the_log_is_stored_in_the_output_and_the_job_has_the_registry(server, words, monkeypatch):
    monkeypatch.setenv(REGISTRY, "s3://clinic/models")
    run(*words, attach=False)
    (job,) = server.submissions
    assert f"s3://clinic/out/jobs/{work_id(words)}.1.log" in job["entrypoint"]
    assert job["env_vars"] == {REGISTRY: "s3://clinic/models"}


def test_a_job_checks_the_signatures_that_this_machine_checks(server, monkeypatch):
    monkeypatch.setenv(signing.ENVIRONMENT, "keys/signers")
    run(attach=False)
    monkeypatch.setenv(signing.ENVIRONMENT, "")
    with pytest.raises(UserError, match="SCALP_SIGNERS is empty"):
        run(again=True, attach=False)
    (job,) = server.submissions
    assert job["env_vars"] == {signing.ENVIRONMENT: str(Path.cwd() / "keys/signers")}


@pytest.mark.parametrize("deliveries", [[6], [2, 4, 6], [3, 1, 4]])
def test_the_log_is_printed_once_to_its_end_over_broken_connections(server, capsys, deliveries):
    server.deliveries = deliveries
    assert run() == 0
    printed = capsys.readouterr().out
    assert "".join(LINES) in printed
    assert printed.count("graded") == len(LINES)


@pytest.mark.promise("README: the exit code of a job is its command's")
@pytest.mark.parametrize(
    ("end", "code"),
    [
        (("SUCCEEDED", 0, ""), 0),
        (("FAILED", 2, "exit code 2"), 2),
        (("FAILED", 137, "killed"), 137),
        (("FAILED", None, "the node was lost"), 1),
        (("STOPPED", None, ""), 143),
    ],
)
def test_the_exit_code_is_that_of_the_command(server, capsys, end, code):
    server.end = end
    assert run() == code
    assert ("failed: the node was lost" in capsys.readouterr().out) == (end[1] is None and end[0] == "FAILED")


@pytest.mark.promise("README: Ctrl-C leaves a job alone")
def test_ctrl_c_detaches_and_the_job_continues(server, capsys):
    server.interrupted = True
    with pytest.raises(Detached) as detached:
        run()
    (id_,) = server.jobs
    assert detached.value.code == INTERRUPTED
    assert server.get(id_).is_alive and not server.stopped
    assert f"detached; {id_} continues" in capsys.readouterr().out.replace("\n", " ").strip()
    server.interrupted = False
    assert run() == 0  # attached again
    assert list(server.jobs) == [id_]


def test_the_command_ends_with_the_exit_code_of_its_job(server, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scalp", "submit", "--address", ADDRESS, *GRADE])
    server.end = ("FAILED", 3, "exit code 3")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 3
    server.interrupted = True
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == INTERRUPTED
    assert "stopped; run the same command" not in capsys.readouterr().err  # nothing was stopped


@pytest.mark.promise("README: bad input is reported with a fix and exit code 2")
def test_a_mistake_is_reported_before_anything_is_sent(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(driver, "_MAX_BYTES", 8 * 2**20)
    Path("photographs").mkdir()
    Path("photographs/large.bin").write_bytes(bytes(9 * 2**20))
    monkeypatch.delenv("NOTHING", raising=False)
    for words, problem in (
        (["grade", GRADE[1], "photographs", GRADE[3]], "photographs is on this machine"),
        (["--include", "photographs", *GRADE], "photographs/large.bin (9 MiB)"),
        (["--include", "nowhere", *GRADE], "nowhere does not exist"),
        (["--include", str(Path(__file__).parent), *GRADE], "is not below the current folder"),
        (["serve", GRADE[1]], "use `serve deploy"),
        (["grad", *GRADE[1:]], "no such command"),
        (["models"], "submit models: its command is missing; name one of "),
        (["--env", "NOTHING", *GRADE], "--env NOTHING: it is not set here"),
    ):
        monkeypatch.setattr(sys, "argv", ["scalp", "submit", "--address", ADDRESS, *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        error, *hints = capsys.readouterr().err.splitlines()
        assert error.startswith("error: ") and all(hint.startswith("hint:  ") for hint in hints)
        message = "; ".join([error, *(hint.removeprefix("hint:  ") for hint in hints)])
        assert ended.value.code == 2 and problem in message and len(hints) <= 1, error
    assert not server.submissions

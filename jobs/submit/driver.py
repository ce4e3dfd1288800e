"""`scalp submit`: submit a scalp command as a Ray job, once, with this checkout's code, and follow it."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from cluster.jobs_api import Job, Jobs
from jobs.common import provenance
from jobs.common.console import console, moment
from jobs.submit.entry import VERSIONS_FILE
from jobs.submit.logs import follow
from scalp_core import storage
from scalp_core.bundles import signing
from scalp_core.bundles.registry import ENVIRONMENT
from scalp_core.errors import UserError

_PACKAGES = ("cluster", "jobs", "scalp_core", "serving")
_CODE_SUFFIXES = {".py", ".yaml", ".json", ".html", ".jinja", ".css", ".js"}
# Size limit of one request to Ray's job server.
_MAX_BYTES = 100 * 2**20
_NOT_AS_JOBS = {
    "serve": "an endpoint is not a job; use `serve deploy serving/config.yaml --address URL`",
    "submit": "name the command to run",
    "jobs": "it queries a cluster from this machine; run it without submit",
    "demo": "it runs on one machine; run it without submit",
    "review": "a reader answers in a browser on this machine; run it without submit",
    "keys": "keys are made where they are stored; run it without submit",
}
# Arguments that name the output of a command; its log is stored there too.
_OUTPUTS = ("out", "run", "sources_and_out")


def submit(
    address: str | None,
    command: Sequence[str],
    app: Any,
    *,
    include: Sequence[str] = (),
    env: Sequence[str] = (),
    again: bool = False,
    attach: bool = True,
    any_versions: bool = False,
    **resources: float | None,
) -> int:
    """Submit a command as a job, or attach to the job of the same command.

    The arguments are the options of `scalp submit`. `app` is the `scalp` command, which checks the arguments
    before submission; `resources` are arguments of Ray's `submit_job`.

    Returns:
        Exit code of the job; 0 for a job that is not followed.

    Raises:
        UserError: The command or its arguments are invalid, or the files of the job are too large.
        ClusterError: The cluster does not answer, refuses access, or runs another Ray version.
    """
    out = _check(command, app)
    files = _collect_files(command, include)
    size = _check_size(files)
    environment = _environment(env)
    jobs = Jobs(address)
    work = work_id(command)
    job = jobs.last(work)
    if job and (job.is_alive or (job.status == "SUCCEEDED" and not again)):
        id_ = job.id
        console.print(f"{id_} {_describe(job)}; attached to it")
    else:
        id_ = f"{work}.{job.attempt + 1 if job else 1}"
        with _copy_files(files) as folder:
            jobs.submit(
                id_,
                _entrypoint(id_, command, out, any_versions),
                {"command": shlex.join(command)},
                runtime_env={"working_dir": folder, "env_vars": environment},
                **resources,
            )
        console.print(f"submitted {id_} with {size / 2**20:.1f} MiB of code and files")
    return follow(jobs, id_) if attach else 0


def work_id(command: Sequence[str]) -> str:
    """Deterministic id of a command, so that the same command is not two jobs at the same time."""
    return f"scalp-{command[0]}-{hashlib.sha256(json.dumps(list(command)).encode()).hexdigest()[:12]}"


def _check(command: Sequence[str], app: Any) -> str | None:
    """Check a command before submission; return the URI of its output, if it names one."""
    verb, *rest = command
    if verb in _NOT_AS_JOBS:
        raise UserError(f"scalp submit {verb}: {_NOT_AS_JOBS[verb]}")
    if verb not in app.commands:
        raise UserError(f"scalp submit {verb}: no such command; scalp --help lists all")
    target, name = app.commands[verb], verb
    while hasattr(target, "commands"):
        if not rest or rest[0] not in target.commands:
            raise UserError(
                f"scalp submit {name}: its command is missing; name one of {', '.join(target.commands)}"
            )
        target, name, rest = target.commands[rest[0]], f"{name} {rest[0]}", rest[1:]
    context = target.make_context(f"scalp submit {name}", list(rest))
    out = None
    for parameter in target.params:
        value = context.params.get(str(parameter.name))
        if parameter.param_type_name == "argument" or parameter.name == "out":
            for location in [value] if isinstance(value, str) else value or ():
                _check_location(name, location)
        if parameter.name in _OUTPUTS and value:
            out = value if isinstance(value, str) else value[-1]
    return out


def _check_location(verb: str, location: str) -> None:
    # A name without a slash is a path only if the file exists: it may be the name of a model.
    if "://" in location or location.startswith("/") or not ("/" in location or Path(location).exists()):
        return
    raise UserError(
        f"scalp submit {verb}: {location} is on this machine, which the cluster cannot read; copy it to S3, "
        "or give an absolute path that every node has"
    )


def _collect_files(command: Sequence[str], include: Sequence[str]) -> dict[str, Path]:
    """Collect the files of the job by their path in it: code, recipes in the command, and `include`."""
    files: dict[str, Path] = {}
    for package in _PACKAGES:
        home = Path(str(import_module(package).__file__)).parent
        for path in home.rglob("*"):
            if path.is_file() and path.suffix in _CODE_SUFFIXES:
                files[f"{package}/{path.relative_to(home)}"] = path
    recipes = [word for word in command if word.endswith((".yaml", ".yml")) and Path(word).is_file()]
    for name in (*recipes, *include):
        path = Path(name)
        if not path.exists():
            raise UserError(f"--include {name} does not exist; check the path")
        try:
            relative = path.resolve().relative_to(Path.cwd())
        except ValueError:
            raise UserError(f"{name} is not below the current folder; change to a folder above it") from None
        if Path(name).is_absolute():
            raise UserError(f"{name} is an absolute path; use the path below the current folder, {relative}")
        for file in [path] if path.is_file() else path.rglob("*"):
            if file.is_file():
                files[str(file.resolve().relative_to(Path.cwd()))] = file
    return files


def _check_size(files: dict[str, Path]) -> int:
    """Return the total size in bytes; refuse one above the limit of the job server."""
    sizes = {name: path.stat().st_size for name, path in files.items()}
    total = sum(sizes.values())
    if total > _MAX_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise UserError(
            f"the files of the job have {total / 2**20:,.0f} MiB, and Ray's job server accepts "
            f"{_MAX_BYTES // 2**20}; the largest is {largest} ({sizes[largest] / 2**20:,.0f} MiB): keep "
            "images in S3, and do not include them"
        )
    return total


@contextmanager
def _copy_files(files: dict[str, Path]) -> Iterator[str]:
    """Copy files, by path in the job, into a temporary folder, which exists while the block runs."""
    with tempfile.TemporaryDirectory(prefix="scalp-submit-") as folder:
        for name, path in files.items():
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        Path(folder, VERSIONS_FILE).write_text(json.dumps(provenance.versions()))
        yield folder


def _environment(env: Sequence[str]) -> dict[str, str]:
    """Environment variables of the job: `env`, a registry in S3, and the signers of promotions."""
    variables = {}
    # A path too, although nodes may lack it: the job then fails, and uses no unsigned promotion.
    if signers := signing.signers_file():
        variables[signing.ENVIRONMENT] = storage.absolute(signers)
    if os.environ.get(ENVIRONMENT, "").startswith("s3://"):
        variables[ENVIRONMENT] = os.environ[ENVIRONMENT]
    for assignment in env:
        name, equals, value = assignment.partition("=")
        if not equals and name not in os.environ:
            raise UserError(f"--env {name}: it is not set here; write --env {name}=VALUE")
        variables[name] = value if equals else os.environ[name]
    return variables


def _entrypoint(id_: str, command: Sequence[str], out: str | None, any_versions: bool) -> str:
    words = ["python", "-m", "jobs.submit.entry"]
    if out:
        words += ["--log", f"{out.rstrip('/')}/jobs/{id_}.log"]
    if not any_versions:
        words += ["--versions", VERSIONS_FILE]
    return shlex.join([*words, *command])


def _describe(job: Job) -> str:
    if job.status == "SUCCEEDED":
        return f"succeeded at {moment(job.ended)}; --rerun runs it again"
    return f"is {job.status.lower()} since {moment(job.started)}"

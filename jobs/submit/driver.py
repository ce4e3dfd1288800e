"""`scalp submit`: any verb as a Ray job, once, with this checkout's code; its end is this command's end."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from cluster.jobs_api import Job, Jobs
from jobs.common import provenance
from jobs.common.console import console, moment
from jobs.submit.entry import VERSIONS_FILE
from jobs.submit.logs import follow
from scalp_core.bundles.registry import ENVIRONMENT
from scalp_core.errors import UserError

_ROOMS = ("cluster", "jobs", "scalp_core", "serving")
_CODE = {".py", ".yaml", ".json", ".html", ".css", ".js"}
# What Ray's job server takes in one request.
_MOST_BYTES = 100 * 2**20
_LARGEST_SHOWN = 3
_NOT_AS_JOBS = {
    "serve": "an endpoint is no job; use `serve deploy serving/config.yaml --address URL`",
    "submit": "name the verb to run",
    "jobs": "it asks a cluster from here; run it without submit",
    "demo": "it shows everything on one machine; run it without submit",
    "keys": "keys are made where they are kept; run it without submit",
}
# Arguments that name what a verb writes, where its log belongs too.
_WRITTEN = ("out", "run", "sources_and_out")


@dataclass(frozen=True)
class SubmitOptions:
    """How a verb is submitted.

    Args:
        include: files and folders below the current one that the job gets beside the code.
        env: `NAME=VALUE`, or `NAME` for what it is here; in the environment of the job and its workers.
        cpus: reserved for the process that drives the verb; 0 runs it on the head.
        gpus: the same.
        memory: the same, bytes.
        again: run work that is finished once more.
        follow: show the log until it ends.
        any_versions: run although packages of the cluster are not those of this machine.
    """

    include: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    cpus: float = 0
    gpus: float = 0
    memory: int = 0
    again: bool = False
    follow: bool = True
    any_versions: bool = False


def submit(address: str | None, command: Sequence[str], app: Any, options: SubmitOptions) -> int:
    """Submits a verb, or attaches to the job that does the same.

    Args:
        address: of the cluster's dashboard, `http://HOST:8265`; None takes RAY_API_SERVER_ADDRESS.
        command: the verb and its arguments.
        app: the table of verbs, which check their arguments here already.
        options: how.

    Returns:
        the job's exit code; 0 for a job that is not followed.

    Raises:
        UserError: the verb or its arguments are wrong here or there, or what the job needs is too large.
        ClusterError: the cluster does not answer, does not let us in, is another Ray, or can never hold it.
    """
    out = _check(command, app)
    files = _included(command, options.include)
    size = _check_size(files)
    environment = _environment(options.env)
    jobs = Jobs(address)
    jobs.check_capacity(options.cpus, options.gpus, options.memory)
    work = work_id(command)
    job = jobs.last(work)
    if job and (job.is_alive or (job.status == "SUCCEEDED" and not options.again)):
        id_ = job.id
        console.print(f"{id_} {_state(job)}; attached to it")
    else:
        id_ = f"{work}.{job.attempt + 1 if job else 1}"
        with _packed(files) as folder:
            jobs.submit(
                id_,
                _entrypoint(id_, command, out, options),
                {"command": shlex.join(command)},
                {"working_dir": folder, "env_vars": environment},
                options.cpus,
                options.gpus,
                options.memory,
            )
        console.print(f"submitted {id_} with {size / 2**20:.1f} MiB of code and files")
    return follow(jobs, id_) if options.follow else 0


def work_id(command: Sequence[str]) -> str:
    """The same for the same words, so that the same work is never two jobs at once."""
    return f"scalp-{command[0]}-{hashlib.sha256(json.dumps(list(command)).encode()).hexdigest()[:12]}"


def _check(command: Sequence[str], app: Any) -> str | None:
    """Refuses here what the cluster would refuse later; where the verb writes, if it says so."""
    verb, *rest = command
    if verb in _NOT_AS_JOBS:
        raise UserError(f"scalp submit {verb}: {_NOT_AS_JOBS[verb]}")
    if verb not in app.commands:
        raise UserError(f"scalp submit {verb}: no such verb; scalp --help lists them")
    found, name = app.commands[verb], verb
    while hasattr(found, "commands"):
        if not rest or rest[0] not in found.commands:
            raise UserError(f"scalp submit {name}: name one of {', '.join(found.commands)}")
        found, name, rest = found.commands[rest[0]], f"{name} {rest[0]}", rest[1:]
    context = found.make_context(f"scalp submit {name}", list(rest))
    written = None
    for parameter in found.params:
        value = context.params.get(str(parameter.name))
        if parameter.param_type_name == "argument" or parameter.name == "out":
            for each in [value] if isinstance(value, str) else value or ():
                _check_place(name, each)
        if parameter.name in _WRITTEN and value:
            written = value if isinstance(value, str) else value[-1]
    return written


def _check_place(verb: str, place: str) -> None:
    # A name without a slash, as of a model, is no path unless there is such a file.
    if "://" in place or place.startswith("/") or not ("/" in place or Path(place).exists()):
        return
    raise UserError(
        f"scalp submit {verb}: {place} is on this machine, where the cluster does not see it; copy it to S3, "
        "or give an absolute path that every node has"
    )


def _included(command: Sequence[str], include: Sequence[str]) -> dict[str, Path]:
    """The files of the job's folder by their paths in it: code, recipes that are named, what is asked for."""
    files: dict[str, Path] = {}
    for room in _ROOMS:
        home = Path(str(import_module(room).__file__)).parent
        for path in home.rglob("*"):
            if path.is_file() and path.suffix in _CODE:
                files[f"{room}/{path.relative_to(home)}"] = path
    recipes = [word for word in command if word.endswith((".yaml", ".yml")) and Path(word).is_file()]
    for name in (*recipes, *include):
        path = Path(name)
        if not path.exists():
            raise UserError(f"--include {name}: there is no such file or folder")
        try:
            relative = path.resolve().relative_to(Path.cwd())
        except ValueError:
            raise UserError(f"{name} is not below the current folder, as what a job gets must be") from None
        if Path(name).is_absolute():
            raise UserError(f"{name}: name it from the current folder, {relative}, as the job will find it")
        for each in [path] if path.is_file() else path.rglob("*"):
            if each.is_file():
                files[str(each.resolve().relative_to(Path.cwd()))] = each
    return files


def _check_size(files: dict[str, Path]) -> int:
    """Bytes in all.

    Raises:
        UserError: more than the job server takes; names the largest.
    """
    sizes = {name: path.stat().st_size for name, path in files.items()}
    total = sum(sizes.values())
    if total > _MOST_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:_LARGEST_SHOWN]
        named = ", ".join(f"{name} ({sizes[name] / 2**20:,.0f} MiB)" for name in largest)
        raise UserError(
            f"what the job gets has {total / 2**20:,.0f} MiB and Ray's job server takes "
            f"{_MOST_BYTES // 2**20}; the largest are {named}: keep photographs in S3 and leave them out"
        )
    return total


@contextmanager
def _packed(files: dict[str, Path]) -> Iterator[str]:
    """A folder with copies of them, for as long as the block runs."""
    with tempfile.TemporaryDirectory(prefix="scalp-submit-") as folder:
        for name, path in files.items():
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        Path(folder, VERSIONS_FILE).write_text(json.dumps(provenance.versions()))
        yield folder


def _environment(env: Sequence[str]) -> dict[str, str]:
    found = {}
    if os.environ.get(ENVIRONMENT, "").startswith("s3://"):
        found[ENVIRONMENT] = os.environ[ENVIRONMENT]
    for each in env:
        name, given, value = each.partition("=")
        if not given and name not in os.environ:
            raise UserError(f"--env {name}: it is not set here; write --env {name}=VALUE")
        found[name] = value if given else os.environ[name]
    return found


def _entrypoint(id_: str, command: Sequence[str], out: str | None, options: SubmitOptions) -> str:
    words = ["python", "-m", "jobs.submit.entry"]
    if out:
        words += ["--log", f"{out.rstrip('/')}/jobs/{id_}.log"]
    if not options.any_versions:
        words += ["--versions", VERSIONS_FILE]
    return shlex.join([*words, *command])


def _state(job: Job) -> str:
    return {"SUCCEEDED": f"ended well at {moment(job.ended)}; --again runs it once more"}.get(
        job.status, f"is {job.status.lower()} since {moment(job.started)}"
    )

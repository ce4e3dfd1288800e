"""`scalp submit` and `scalp jobs`: their options; `jobs.submit` does the work."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from jobs.cli.options import JsonOption, with_old_names

SubmitCommand = with_old_names(
    {"--again": "--rerun", "--no-follow": "--detach", "--any-versions": "--allow-mismatch"}
)

AddressOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="dashboard of the cluster, http://HOST:8265; default: RAY_API_SERVER_ADDRESS in the environment",
    ),
]

JobArg = Annotated[str, typer.Argument(help="job id; without .ATTEMPT: its latest attempt")]

jobs = typer.Typer(
    help="List, follow and stop jobs of `scalp submit` on a cluster.",
    epilog="Example: scalp jobs list",
    no_args_is_help=True,
)


def submit(
    context: typer.Context,
    command: Annotated[
        list[str],
        typer.Argument(metavar="VERB ARGUMENTS...", help="scalp command to run, with data in s3://"),
    ],
    address: AddressOption = None,
    include: Annotated[
        list[str],
        typer.Option(
            metavar="PATH",
            help="file or folder to copy to the job, below the current folder; may be repeated",
        ),
    ] = [],  # noqa: B006
    env: Annotated[
        list[str],
        typer.Option(
            metavar="NAME[=VALUE]",
            help="environment variable of the job; default value: as on this machine; may be repeated; "
            "visible in the cluster's dashboard",
        ),
    ] = [],  # noqa: B006
    cpus: Annotated[
        float, typer.Option(min=0, help="CPUs to reserve for the driver process; 0 runs it on the head node")
    ] = 0,
    gpus: Annotated[
        float, typer.Option(min=0, help="GPUs to reserve for the driver process, which `explain` uses")
    ] = 0,
    memory: Annotated[float, typer.Option(min=0, help="memory to reserve for the driver process, GiB")] = 0,
    rerun: Annotated[bool, typer.Option("--rerun", help="run a finished command again")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="exit after submitting, without the log")] = False,
    allow_mismatch: Annotated[
        bool,
        typer.Option("--allow-mismatch", help="run even if package versions of the cluster differ"),
    ] = False,
) -> None:
    """Submit a command as a job to a cluster, with this checkout's code; the same again attaches to the job.

    Options of submit come before VERB. The log is printed until the job ends, and its exit code returned.
    Ctrl-C detaches, and the job continues. A job that failed or was stopped resumes when submitted again.
    """
    from jobs.submit.driver import submit as verb

    code = verb(
        address,
        command,
        context.find_root().command,
        include=include,
        env=env,
        again=rerun,
        attach=not detach,
        any_versions=allow_mismatch,
        entrypoint_num_cpus=cpus or None,
        entrypoint_num_gpus=gpus or None,
        entrypoint_memory=int(memory * 2**30) or None,
    )
    sys.exit(code)


@jobs.command("list", epilog="Example: scalp jobs list --address http://127.0.0.1:8265")
def jobs_list(address: AddressOption = None, json_: JsonOption = False) -> None:
    """List the jobs of a cluster, the latest at the bottom."""
    from rich.table import Table

    from cluster.jobs_api import Jobs
    from jobs.common.console import console, moment, print_json
    from jobs.common.errors import printable

    cluster = Jobs(address)
    if json_:
        print_json(
            [
                {
                    "job": job.id,
                    "status": job.status.lower(),
                    "started": moment(job.started) or None,
                    "ended": moment(job.ended) or None,
                    "command": job.command,
                }
                for job in cluster.all()
            ]
        )
        return
    table = Table("job", "status", "started", "ended", "command", title=cluster.address, title_justify="left")
    for job in cluster.all():
        moments = (moment(job.started), moment(job.ended))
        table.add_row(job.id, job.status.lower(), *moments, printable(job.command))
    console.print(table)


@jobs.command("logs", epilog="Example: scalp jobs logs scalp-train-0123456789ab")
def jobs_logs(job: JobArg, address: AddressOption = None) -> None:
    """Print the log of a job until it ends, and exit with its exit code."""
    from cluster.jobs_api import Jobs
    from jobs.submit.logs import follow

    cluster = Jobs(address)
    sys.exit(follow(cluster, cluster.get(job).id))


@jobs.command("stop", epilog="Example: scalp jobs stop scalp-train-0123456789ab")
def jobs_stop(job: JobArg, address: AddressOption = None) -> None:
    """Stop a job; submitted again, it resumes."""
    from cluster.jobs_api import Jobs
    from jobs.submit.logs import stop

    cluster = Jobs(address)
    stop(cluster, cluster.get(job).id)

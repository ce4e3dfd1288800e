"""`scalp submit` and `scalp jobs`: their options; their work is in `submit` and `job_logs`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

AddressOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="of the cluster's dashboard, http://HOST:8265; or RAY_API_SERVER_ADDRESS"
    ),
]

jobs = typer.Typer(help="The jobs of a cluster that `scalp submit` started.", no_args_is_help=True)


def submit(
    context: typer.Context,
    command: Annotated[
        list[str], typer.Argument(metavar="VERB ARGUMENTS...", help="as without submit; data in s3://")
    ],
    address: AddressOption = None,
    include: Annotated[
        list[str],
        typer.Option(metavar="PATH", help="file or folder below this one that the job gets; may be repeated"),
    ] = [],  # noqa: B006
    env: Annotated[
        list[str],
        typer.Option(
            metavar="NAME[=VALUE]",
            help="in the job's environment, with its value here or this one; may be repeated; all who may "
            "see the cluster's dashboard see it",
        ),
    ] = [],  # noqa: B006
    cpus: Annotated[
        float, typer.Option(min=0, help="for the process that drives the verb; 0 is the head's")
    ] = 0,
    gpus: Annotated[float, typer.Option(min=0, help="for the same, such as `explain` on a GPU")] = 0,
    memory: Annotated[float, typer.Option(min=0, help="GiB for the same")] = 0,
    again: Annotated[bool, typer.Option("--again", help="run work that is finished once more")] = False,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="do not wait for its end")] = False,
    any_versions: Annotated[
        bool, typer.Option("--any-versions", help="run although the cluster's packages are others")
    ] = False,
) -> None:
    """Runs a verb as a job on a cluster, with this checkout's code; the same again attaches to it.

    scalp submit --address http://HOST:8265 train s3://clinic/data s3://clinic/run --workers 4

    Options of submit come before VERB. The log is shown until the job ends, whose exit code is this
    command's; Ctrl-C lets it go on alone. A job that failed or was stopped is submitted anew and goes on.
    """
    from jobs.submit.driver import SubmitOptions
    from jobs.submit.driver import submit as verb

    options = SubmitOptions(
        tuple(include), tuple(env), cpus, gpus, int(memory * 2**30), again, not no_follow, any_versions
    )
    sys.exit(verb(address, command, context.find_root().command, options))


@jobs.command("list")
def jobs_list(address: AddressOption = None) -> None:
    """Shows the jobs of a cluster, the last one at the bottom."""
    from rich.table import Table

    from cluster.jobs_api import Jobs
    from jobs.common.console import console, moment, printable

    cluster = Jobs(address)
    table = Table("job", "status", "started", "ended", "command", title=cluster.address, title_justify="left")
    for job in cluster.all():
        moments = (moment(job.started), moment(job.ended))
        table.add_row(job.id, job.status.lower(), *moments, printable(job.command))
    console.print(table)


@jobs.command("logs")
def jobs_logs(
    job: Annotated[str, typer.Argument(help="its id; without .ATTEMPT the last attempt")],
    address: AddressOption = None,
) -> None:
    """Shows the log of a job, until it ends; exits as the job did."""
    from cluster.jobs_api import Jobs
    from jobs.submit.logs import follow

    cluster = Jobs(address)
    sys.exit(follow(cluster, cluster.get(job).id))


@jobs.command("stop")
def jobs_stop(
    job: Annotated[str, typer.Argument(help="its id; without .ATTEMPT the last attempt")],
    address: AddressOption = None,
) -> None:
    """Ends a job; submitted again, it goes on where it was."""
    from cluster.jobs_api import Jobs
    from jobs.submit.logs import stop

    cluster = Jobs(address)
    stop(cluster, cluster.get(job).id)

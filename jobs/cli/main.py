"""The `scalp` command: its subcommands, their arguments and options."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Annotated, Any

import typer

from cluster.resources import ClusterError
from jobs.cli.audit import audit
from jobs.cli.bench import bench
from jobs.cli.calibrate import calibrate
from jobs.cli.data import PrepareCommand, prepare, pseudonymize, synth
from jobs.cli.grade import GradeCommand, ResultsCommand, grade, neighbors, results, review
from jobs.cli.keys import keys
from jobs.cli.models import models
from jobs.cli.options import JsonOption
from jobs.cli.serve import ServeCommand, serve, store
from jobs.cli.submit import SubmitCommand, jobs, submit
from jobs.cli.training import audit_labels, evaluate, explain, improve, quantize, train, tune
from jobs.common import supervise
from jobs.common.errors import print_error
from jobs.common.interrupt import INTERRUPTED, Detached
from scalp_core.errors import UserError

# Each command imports its module when it is called: Ray and PyTorch take seconds to import.

# Panels of `scalp --help`, in the order of work: that of their first command below.
_TRY, _DATA, _MODEL, _GRADE, _SERVE, _CLUSTER = (
    "Try", "Data", "Models", "Bulk grading", "Endpoint", "Clusters and speed",
)  # fmt: skip


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"scalp {metadata.version('scalp')}")  # noqa: T201
        raise typer.Exit


app = typer.Typer(
    help="Grade micro-keratin (미세각질, fine flaking) on scalp images: "
    "0 good, 1 mild, 2 moderate, 3 severe.",
    epilog="Example: scalp demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", help="print the version and exit", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Declare the options before a command."""


@app.command(rich_help_panel=_TRY, epilog="Example: scalp demo --out runs/demo --images 1000")
def demo(
    out: Annotated[str, typer.Option(help="output folder, local")] = "runs/demo",
    images: Annotated[int, typer.Option(min=200, help="number of synthetic images")] = 2000,
) -> None:
    """Demonstrate the pipeline on this machine: synthetic images, training, evaluation, S3, bulk, serving."""
    from jobs.demo import demo as verb

    verb(out, images)


@app.command(
    rich_help_panel=_TRY, epilog="Examples:\n\nscalp doctor\n\nscalp doctor s3://clinic/2024/ --port 8080"
)
def doctor(
    uris: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="URI...", help="folders, prefixes or files that must be readable, local or s3://"
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="port of `scalp serve` that must be free")
    ] = 8000,
    json_: JsonOption = False,
) -> None:
    """Check this machine: Python, packages, GPU, Ray, disk, port, model registry and S3.

    Exits with code 1 if a check fails.
    """
    from jobs.common.console import print_json
    from jobs.doctor import doctor as verb

    outcome = verb(uris or [], port)
    if json_:
        print_json(outcome)
    if not outcome["passed"]:
        raise typer.Exit(1)


app.command(
    rich_help_panel=_TRY,
    epilog="Example: scalp synth images --images 2000 --layout zipped --set devices=40",
)(synth)


app.command(
    cls=PrepareCommand,
    rich_help_panel=_DATA,
    epilog="Examples:\n\nscalp prepare /data/aihub216 data/\n\n"
    "scalp prepare s3://clinic/labels.csv s3://clinic/data --ratio 8:1:1",
)(prepare)


app.command(rich_help_panel=_DATA, epilog="Example: scalp pseudonymize data/ export/ --key-file key.txt")(
    pseudonymize
)


app.command(
    rich_help_panel=_MODEL,
    epilog="Examples:\n\nscalp train data/ runs/first\n\n"
    "scalp train s3://clinic/data s3://clinic/run --workers 2:8 --set epochs=5",
)(train)


app.command(
    rich_help_panel=_MODEL,
    epilog="Examples:\n\nscalp tune data/ runs/tune --trials 32 --set epochs=5\n\n"
    "scalp train data/ runs/best --recipe runs/tune/best.yaml",
)(tune)


app.command(
    rich_help_panel=_MODEL,
    epilog="Examples:\n\nscalp evaluate runs/first data/ runs/first/test\n\n"
    "scalp evaluate runs/first runs/second data/ runs/compared",
)(evaluate)


app.command(
    "audit-labels",
    rich_help_panel=_DATA,
    epilog="Examples:\n\nscalp train data/ runs/folds --folds 5\n\nscalp audit-labels runs/folds suspects/",
)(audit_labels)


app.command(
    rich_help_panel=_MODEL,
    epilog="Examples:\n\nscalp improve models://scalp labels/ data/ rounds/1 --set epochs=6\n\n"
    "scalp submit --address http://127.0.0.1:8265 improve models://scalp s3://clinic/labels s3://clinic/data "
    "s3://clinic/rounds/1 --promote",
)(improve)


app.command(rich_help_panel=_MODEL, epilog="Example: scalp quantize runs/first data/ --max-drop 0.005")(
    quantize
)


app.command(
    rich_help_panel=_MODEL,
    epilog="Example: scalp calibrate models://scalp clinic-data/ runs/clinic --target 'wrong<=5%'",
)(calibrate)


app.command(
    cls=GradeCommand,
    rich_help_panel=_GRADE,
    epilog="Examples:\n\nscalp grade runs/first monday.zip s3://clinic/2024/ graded/\n\n"
    "scalp grade models://scalp cases.csv s3://clinic/graded/ --replicas 2:16\n\n"
    "scalp grade models://scalp s3://clinic/export/ graded/ --write fhir",
)(grade)
app.command(
    cls=ResultsCommand,
    rich_help_panel=_GRADE,
    epilog="Examples:\n\nscalp results graded/ --by folder\n\n"
    "scalp results graded/ --status failed --output failed.csv\n\n"
    "scalp results graded/ --write fhir --output graded.ndjson\n\n"
    "scalp results graded/ --sql 'select grade, count(*) from results group by grade'",
)(results)
app.command(
    rich_help_panel=_GRADE,
    epilog="Examples:\n\nscalp review graded/ labels/ --reader kim\n\n"
    "scalp review graded/ labels/ --reader lead --adjudicate\n\n"
    "scalp prepare labels/ data/",
)(review)
app.command(
    rich_help_panel=_GRADE,
    epilog="Example: scalp neighbors graded/ labels/ --bundle runs/first --data data/",
)(neighbors)
app.add_typer(models, name="models", rich_help_panel=_MODEL)
app.command(
    cls=ServeCommand,
    rich_help_panel=_SERVE,
    epilog="Examples:\n\nscalp serve runs/first\n\n"
    "scalp serve models://scalp --host 0.0.0.0 --keys keys.txt --audit audit/",
)(serve)
app.add_typer(store, name="store", rich_help_panel=_SERVE)
app.add_typer(keys, name="keys", rich_help_panel=_SERVE)
app.add_typer(audit, name="audit", rich_help_panel=_SERVE)
app.command(
    cls=SubmitCommand,
    rich_help_panel=_CLUSTER,
    context_settings={"allow_interspersed_args": False},
    epilog="Example: scalp submit --address http://127.0.0.1:8265 train s3://clinic/data s3://clinic/run",
)(submit)
app.add_typer(jobs, name="jobs", rich_help_panel=_CLUSTER)
app.add_typer(bench, name="bench", rich_help_panel=_CLUSTER)
# Spellings of earlier versions.
app.command("quantise", hidden=True)(quantize)
app.command("pseudonymise", hidden=True)(pseudonymize)


@app.command(hidden=True, context_settings={"ignore_unknown_options": True})
def export(arguments: list[str]) -> None:
    """Name the command that replaces `scalp export`."""
    raise UserError(f"scalp export {' '.join(arguments)} was removed; use scalp models pull MODEL OUT")


app.command(
    rich_help_panel=_MODEL,
    epilog="Example: scalp explain runs/first s3://clinic/2024/ explained/ --grade 3 --limit 20",
)(explain)


@app.command(rich_help_panel=_SERVE, epilog="Example: scalp compare audit/")
def compare(
    audit: Annotated[
        str, typer.Argument(metavar="AUDIT", help="audit log: the folder of `scalp serve --audit`")
    ],
    json_: JsonOption = False,
) -> None:
    """Compare the grades of a shadow or canary bundle with those of the serving bundle, from an audit log."""
    from jobs.common.console import print_json
    from jobs.evaluate.compare import compare as verb

    comparison = verb(audit)
    if json_:
        print_json(comparison)


def main() -> None:
    """Run the `scalp` command; after a user's mistake print problem and fix, and exit with code 2."""
    try:
        sys.exit(app(standalone_mode=False) or 0)  # 130 after Ctrl-C
    except typer.TyperException as error:
        _refuse_usage(error)
    except typer.Abort:
        sys.exit(INTERRUPTED)
    except (UserError, ClusterError) as error:
        # An error from a Ray worker contains a traceback; the first line of its cause is the message.
        print_error(str(getattr(error, "cause", error)).splitlines()[0])
        sys.exit(2)
    except SystemExit as ended:
        if ended.code == INTERRUPTED and not isinstance(ended, Detached):
            print("scalp: stopped; run the same command again to resume", file=sys.stderr)  # noqa: T201
        raise


def _refuse_usage(error: Any) -> None:
    """Print what is wrong with the arguments of a command, and which help explains them."""
    problem = error.format_message().rstrip(".").replace("Value error, ", "")
    if problem:  # a group without a command has printed its help
        command = error.ctx.command_path if getattr(error, "ctx", None) else _named_command(sys.argv[1:])
        print_error(f"{command}: {problem[0].lower()}{problem[1:]}; see {command} --help")
    sys.exit(2)


def _named_command(words: list[str]) -> str:
    """Return the command that the arguments name, for errors of the parser, which have no context."""
    command: Any = typer.main.get_command(app)
    names = ["scalp"]
    for word in words:
        if word not in getattr(command, "commands", {}):
            break
        command = command.commands[word]
        names.append(word)
    return " ".join(names)


def run() -> None:
    """Run `main` as the console script does: a command in one process may be started again after a crash."""
    supervise.enable()
    try:
        main()
    except SystemExit as ended:
        if isinstance(ended.code, int):
            supervise.end(ended.code)
        raise
    supervise.end(0)

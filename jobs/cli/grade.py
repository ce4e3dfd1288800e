"""`scalp grade` and `scalp results`: their arguments and options."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from jobs.common.options import BatchOption, BundleArg, DeviceOption, PrecisionOption, RuntimeOption
from scalp_core.errors import UserError

# The verbs' own modules are imported when they are called: Ray takes seconds.


def grade(
    bundle: BundleArg,
    sources_and_out: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE... OUT",
            help="folders, prefixes, .zip, .tar or .tar.gz, .csv or .parquet with a column uri, directories "
            "that `scalp prepare` wrote; local or s3://. Last, the directory for what is made",
        ),
    ],
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    batch_size: BatchOption = 128,
    runtime: RuntimeOption = "auto",
    models: Annotated[
        str | None,
        typer.Option(metavar="N|MIN:MAX", help="model actors; without it as many as the cluster holds"),
    ] = None,
    cpus_per_model: Annotated[int | None, typer.Option(min=1, help="cores of each model")] = None,
    gpus_per_model: Annotated[
        float | None, typer.Option(min=0.05, help="share of a GPU; 0.5 puts two models on one")
    ] = None,
    loaders: Annotated[int | None, typer.Option(min=1, help="tasks that fetch and decode at once")] = None,
    fetches: Annotated[int, typer.Option(min=1, help="files that each of them fetches at once")] = 16,
    shard_size: Annotated[
        int | None, typer.Option(min=1, help="photographs that are committed together")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="grade the failed rows of OUT again")
    ] = False,
    max_failed_share: Annotated[
        float, typer.Option(min=0, max=1, help="stop early when more than this share fails; 1 never stops")
    ] = 0.5,
    heatmaps: Annotated[
        int, typer.Option(min=0, help="referred photographs with a heatmap in the report")
    ] = 12,
    no_links: Annotated[
        bool,
        typer.Option("--no-links", help="refuse links that lead out of a local source, as failed rows"),
    ] = False,
    no_tables: Annotated[
        bool,
        typer.Option("--no-tables", help="refuse tables and prepared data, which name photographs anywhere"),
    ] = False,
) -> None:
    """Grade every image of the sources once; the same command resumes a stopped run."""
    from jobs.common.inference import ModelOptions
    from jobs.grade.driver import GradeOptions
    from jobs.grade.driver import grade as verb
    from jobs.grade.planning import PoolOptions
    from jobs.train.scaling import parse_range
    from scalp_core.storage import outputs

    *sources, out = sources_and_out
    if not sources:
        raise UserError(f"scalp grade {bundle} {out}: name OUT, the directory for what is made, last")
    try:
        outputs.check_claim(out, "grade")
    except UserError as error:
        if error.__cause__:  # storage could not be read
            raise
        # As where OUT was forgotten, and the last SOURCE is taken for it.
        raise UserError(f"{error}; if {out} is a source, write OUT after it") from None
    pool = PoolOptions(
        parse_range("--models", models), cpus_per_model, gpus_per_model, loaders, fetches, shard_size
    )
    model = ModelOptions(device, precision, batch_size, runtime)
    options = GradeOptions(
        model, pool, max_failed_share, retry_failed, heatmaps, tables=not no_tables, links=not no_links
    )
    verb(bundle, sources, out, options)


def results(
    out: Annotated[str, typer.Argument(help="directory that `scalp grade` wrote, local or s3://")],
    by: Annotated[
        Literal["grade", "folder", "archive", "device", "error", "reason", "day"] | None,
        typer.Option(help="counts by it; device and day as AI Hub's names say"),
    ] = None,
    only: Annotated[Literal["graded", "failed", "referred"] | None, typer.Option(help="these rows")] = None,
    grade: Annotated[int | None, typer.Option(min=0, max=3, help="rows that got it")] = None,
    under: Annotated[
        str | None, typer.Option(help="rows below a folder, prefix, ARCHIVE or ARCHIVE!FOLDER")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="lines; without it 50 are shown, all written")
    ] = None,
    to: Annotated[
        str | None, typer.Option(help=".csv, .jsonl or .parquet file for them, local or s3://")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace the file that --to names, if there is one")
    ] = False,
    sql: Annotated[str | None, typer.Option(help="a select of your own from the table results")] = None,
) -> None:
    """Shows or exports what `scalp grade` found: an overview, counts by something, or chosen rows."""
    from jobs.grade.results import Question, parse_under
    from jobs.grade.results import results as verb
    from scalp_core.results.query import Selection

    selection = Selection(only, grade, under and parse_under(under))
    verb(out, Question(selection, by, sql, limit, to, overwrite))

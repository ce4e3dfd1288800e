"""`scalp grade`, `scalp results`, `scalp review` and `scalp neighbors`: their arguments and options."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from jobs.cli.options import (
    BatchOption,
    BundleArg,
    DeviceOption,
    JsonOption,
    PrecisionOption,
    RuntimeOption,
    parse_range,
    with_old_names,
)
from scalp_core.errors import UserError

GradeCommand = with_old_names(
    {
        "--models": "--replicas",
        "--cpus-per-model": "--cpus-per-replica",
        "--gpus-per-model": "--gpus-per-replica",
        "--fetches": "--loader-requests",
    }
)
ResultsCommand = with_old_names({"--only": "--status", "--under": "--path-prefix", "--to": "--output"})

# Each command imports its module when it is called: Ray takes seconds to import.


def grade(
    bundle: BundleArg,
    sources_and_out: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE... [OUT]",
            help="images to grade: folders, prefixes, .zip, .tar or .tar.gz, .csv or .parquet with a column "
            "uri, or output of `scalp prepare`; local or s3://. The last argument is the output directory, "
            "unless --out names it",
        ),
    ],
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="output directory; all arguments are sources then")
    ] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    batch_size: BatchOption = 512,
    runtime: RuntimeOption = "auto",
    replicas: Annotated[
        str | None,
        typer.Option(metavar="N|MIN:MAX", help="model processes; default: as many as fit the cluster"),
    ] = None,
    cpus_per_replica: Annotated[
        int | None,
        typer.Option(min=1, help="CPU cores per replica; default: 1 on GPUs, else an eighth of a node"),
    ] = None,
    gpus_per_replica: Annotated[
        float | None,
        typer.Option(min=0.05, help="GPUs per replica; default: 0.5, or 1 if --replicas is at most the GPUs"),
    ] = None,
    loaders: Annotated[
        int | None, typer.Option(min=1, help="parallel tasks that fetch and decode; default: by free CPUs")
    ] = None,
    loader_requests: Annotated[
        int, typer.Option(min=1, help="parallel requests to storage per loading task")
    ] = 16,
    shard_size: Annotated[
        int | None,
        typer.Option(min=1, help="images per commit; default: 128 on CPUs, 512 on GPUs, fewer if large"),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="grade the failed images of OUT again")
    ] = False,
    max_failed_share: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="largest fraction of failed images before the run stops; 1: no limit"
        ),
    ] = 0.5,
    heatmaps: Annotated[
        int, typer.Option(min=0, help="maximum number of heatmaps of referred images in the report")
    ] = 12,
    write: Annotated[
        Literal["fhir", "dicom-sr"] | None,
        typer.Option(
            help="write one clinical document per row to OUT/documents, after the images are graded. fhir: "
            "fhir.ndjson; dicom-sr: dicom-sr.zip. For patients, use `scalp results --write`"
        ),
    ] = None,
    no_links: Annotated[
        bool,
        typer.Option("--no-links", help="report links that lead out of a local source as failed rows"),
    ] = False,
    local: Annotated[
        bool | None,
        typer.Option(
            "--local/--cluster",
            help="run in this process without Ray, or in Ray; default: in Ray if RAY_ADDRESS names a "
            "cluster, this machine has a GPU, or --replicas is given, else in this process",
        ),
    ] = None,
    no_tables: Annotated[
        bool,
        typer.Option(
            "--no-tables", hidden=True, help="refuse tables and prepared data, which can name images anywhere"
        ),
    ] = False,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="count images, estimate time, requests and cost, and grade nothing"),
    ] = False,
    rate: Annotated[
        float | None,
        typer.Option(min=0.001, help="images per second, for --plan; default: that of the run in OUT"),
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="price of all machines per hour, for --plan")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Grade every image of the sources once; the same command resumes a stopped run."""
    sources = sources_and_out if out else sources_and_out[:-1]
    out = out or sources_and_out[-1]
    if not sources:
        raise UserError(f"scalp grade {bundle} {out}: OUT is missing; name the output directory with --out")
    from jobs.common.console import print_json
    from jobs.common.inference import ModelOptions
    from scalp_core.storage import outputs
    from scalp_core.storage.uris import check_scheme

    check_scheme(out)
    try:
        outputs.check_claim(out, "grade")
    except UserError as error:
        if error.__cause__:  # storage could not be read
            raise
        # Perhaps OUT was forgotten, and the last SOURCE was taken for it.
        raise UserError(f"{error}, or, if {out} is a source, name OUT with --out") from None
    model = ModelOptions(device, precision, batch_size, runtime)
    documents = () if write is None else (write,)
    if plan:
        from jobs.grade.estimate import estimate

        plan_ = estimate(
            bundle, sources, out, model, rate, price, not no_tables, not no_links, documents=documents
        )
        if json_:
            print_json(plan_)
        return
    from jobs.cli.executors import SMALLER_BATCH, make_executor, runs_here

    # One process has one model.
    here = runs_here(local, needs_cluster=replicas is not None)
    executor = make_executor(here, f"{SMALLER_BATCH} or --shard-size")
    from jobs.grade.driver import GradeOptions
    from jobs.grade.driver import grade as verb
    from jobs.grade.planning import PoolOptions

    if not executor.uses_ray and cpus_per_replica is None:
        cpus_per_replica = executor.cluster().cores_per_node
    pool = PoolOptions(
        parse_range("--replicas", replicas),
        cpus_per_replica,
        gpus_per_replica,
        loaders,
        loader_requests,
        shard_size,
    )
    options = GradeOptions(
        model,
        pool,
        max_failed_share,
        retry_failed,
        heatmaps,
        not no_tables,
        not no_links,
        documents=documents,
    )
    summary = verb(bundle, sources, out, options, executor=executor)
    if json_:
        print_json(summary)


def results(
    out: Annotated[str, typer.Argument(help="output directory of `scalp grade`, local or s3://")],
    by: Annotated[
        Literal["grade", "folder", "archive", "device", "error", "reason", "day"] | None,
        typer.Option(
            metavar="VALUE",
            help="count rows per grade, folder, archive, device, error, reason or day; device and day are "
            "read from AI Hub's file names",
        ),
    ] = None,
    status: Annotated[
        Literal["graded", "failed", "referred"] | None, typer.Option(help="rows to select")
    ] = None,
    grade: Annotated[int | None, typer.Option(min=0, max=3, help="rows with this grade")] = None,
    path_prefix: Annotated[
        str | None, typer.Option(help="rows below a folder, prefix, ARCHIVE or ARCHIVE!FOLDER")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="maximum number of rows; default: 50 on the terminal, all with --output or --json"
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="output file: .csv, .jsonl or .parquet; with --write .ndjson or .zip. Local or s3://",
        ),
    ] = None,
    write: Annotated[
        Literal["fhir", "dicom-sr"] | None,
        typer.Option(
            help="write one clinical document per row to the file of --output. fhir: .ndjson with one "
            "transaction per line; dicom-sr: .zip of structured reports"
        ),
    ] = None,
    patients: Annotated[
        bool,
        typer.Option(
            "--patients",
            help="copy patient and study from the headers of DICOM images, which are read again, to the "
            "documents of --write",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace an existing file of --output")
    ] = False,
    sql: Annotated[str | None, typer.Option(help="your own SQL select from the table `results`")] = None,
    json_: JsonOption = False,
) -> None:
    """Print or export results of `scalp grade`: an overview, counts per value, or selected rows."""
    from jobs.grade.results import parse_path_prefix
    from jobs.grade.results import results as verb
    from scalp_core.results.query import Selection

    selection = Selection(status, grade, path_prefix and parse_path_prefix(path_prefix))
    verb(out, selection, by, sql, limit, output, overwrite, json_, write, patients)


def review(
    graded: Annotated[
        str,
        typer.Argument(
            help="output directory of `scalp grade`, or of `scalp audit-labels` for suspect labels; local or "
            "s3://"
        ),
    ],
    labels: Annotated[
        str, typer.Argument(help="directory of the label log, local or s3://; several readers share it")
    ],
    reader: Annotated[str, typer.Option(metavar="NAME", help="name of the reader, stored in each answer")],
    show_model: Annotated[
        bool,
        typer.Option(
            "--show-model/--blind",
            help="whether the reader sees grade, probabilities and reasons of the model. Blind by default: "
            "readers tend to follow an answer that they see, which would favor the model in an evaluation",
        ),
    ] = False,
    adjudicate: Annotated[
        bool,
        typer.Option(
            "--adjudicate",
            help="open the images on which readers disagree, with the answers but without names, and decide",
        ),
    ] = False,
    order: Annotated[
        Literal["referred", "informative", "diverse"],
        typer.Option(
            metavar="ORDER",
            help="referred: order of the result rows, or of the audit; informative: smallest margin between "
            "the two likeliest grades first, then the largest grade set; diverse: uncertain images that look "
            "different first, by features of the run's bundle, which are computed once and kept in LABELS",
        ),
    ] = "referred",
    all_: Annotated[
        bool, typer.Option("--all", help="open answered images too; default: only others")
    ] = False,
    bundle: Annotated[
        str | None,
        typer.Option(
            help="bundle of the bulk run: the reader may ask for heatmaps of its answers; a label given "
            "after that is marked. Default: no heatmaps"
        ),
    ] = None,
    neighbors: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="prepared data: the reader may ask for training images that look alike, with their grades; "
            "a label given after that is marked. Needs --bundle; features are computed once, kept in LABELS",
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="port of the page on 127.0.0.1; one per reader")
    ] = 8001,
) -> None:
    """Review referred images, or images with suspect labels, on a web page of this machine.

    Each answer is stored before the page says so. Ctrl-C ends; the same command resumes.
    """
    from jobs.review.driver import ReviewOptions
    from jobs.review.driver import review as verb

    options = ReviewOptions(reader, show_model, adjudicate, order, all_, port, bundle, neighbors)
    verb(graded, labels, options)


def neighbors(
    graded: Annotated[
        str,
        typer.Argument(help="output directory of `scalp grade`, or store of `scalp serve`; local or s3://"),
    ],
    labels: Annotated[str, typer.Argument(help="directory of the label log, which keeps what is found")],
    bundle: Annotated[str, typer.Option(help="bundle that graded the images, whose features are compared")],
    data: Annotated[str, typer.Option(help="prepared data, whose train split is searched")],
) -> None:
    """Find training images that look like the referred images, for a review on the endpoint.

    The setting `review.neighbors` offers them to readers. The same command adds those of new images.
    """
    from jobs.review.model_view import compute_neighbors as verb

    verb(graded, labels, bundle, data)

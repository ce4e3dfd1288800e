"""The `scalp` command: its subcommands, their arguments and options."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Annotated, Literal

import typer

from cluster.resources import ClusterError
from jobs.cli.audit import audit
from jobs.cli.bench import bench
from jobs.cli.grade import grade, results
from jobs.cli.keys import keys
from jobs.cli.models import models
from jobs.cli.serve import serve
from jobs.cli.submit import jobs, submit
from jobs.common import supervise
from jobs.common.interrupt import INTERRUPTED, Detached
from jobs.common.options import (
    BatchOption,
    BundleArg,
    DataArg,
    DeviceOption,
    LocalOption,
    MaxDropOption,
    OutArg,
    PrecisionOption,
    RuntimeOption,
    SetOption,
    parse_range,
)
from scalp_core.errors import UserError
from scalp_core.grades import SYMPTOMS

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
    rich_help_panel=_TRY,
    epilog="Example: scalp synth photographs --images 2000 --layout zipped --set devices=40",
)
def synth(
    out: Annotated[str, typer.Argument(help="output folder, local")],
    images: Annotated[int, typer.Option(min=1, help="number of images")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="random seed; the same seed gives the same bytes")] = 0,
    layout: Annotated[
        Literal["delivered", "zipped", "zipped-cp949"],
        typer.Option(
            help="delivered: folders, as AI Hub unpacks them; zipped: one zip per folder; zipped-cp949: "
            "Training.zip and Validation.zip, as Korean Windows packs them"
        ),
    ] = "delivered",
    set_: SetOption = [],  # noqa: B006
) -> None:
    """Generate synthetic scalp images in a layout of AI Hub set 216.

    Keys of --set: label_noise, color_cast, lighting, hair_density, hair_density_spread, blur, devices,
    every_symptom (copies of each image under each symptom, as in the real set).
    """
    from jobs.data.synth import synth as verb
    from scalp_core.settings import parse_overrides, parse_settings
    from scalp_core.synthetic.plan import SynthOptions

    values = {"images": images, "seed": seed, "layout": layout, **parse_overrides(set_)}
    verb(out, parse_settings(SynthOptions, values, "--set"))


@app.command(
    rich_help_panel=_DATA,
    epilog="Examples:\n\nscalp prepare /data/aihub216 data/\n\n"
    "scalp prepare s3://clinic/labels.csv s3://clinic/data --split 8:1:1",
)
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="folder, .zip, .tar or s3:// prefix with AI Hub set 216 or one folder per class; or a .csv "
            "or .parquet table with columns uri, label and optionally group"
        ),
    ],
    out: OutArg,
    task: Annotated[
        Literal["folder", "json", "unlabelled"] | None,
        typer.Option(
            help="source of labels: folder (name of the folder, as in the paper), json (value in AI Hub's "
            "label file) or unlabelled; default: folder, or the column label of a table"
        ),
    ] = None,
    symptom: Annotated[str, typer.Option(help=f"symptom to read: {', '.join(SYMPTOMS)}")] = SYMPTOMS[0],
    split: Annotated[
        str, typer.Option(help="ratio TRAIN:VAL:TEST; the paper states 7:2:1, its notebook uses 7:1:2")
    ] = "7:2:1",
    split_by: Annotated[
        Literal["group", "official", "random"],
        typer.Option(
            help="split method: group (no group is in two splits), official (as delivered, without the "
            "overlap) or random (as in the paper; it leaks)"
        ),
    ] = "group",
    group: Annotated[
        str,
        typer.Option(
            help="keys that join images into one group, comma-separated, in addition to equal bytes: device, "
            "session, near_duplicate"
        ),
    ] = "device,session,near_duplicate",
    group_by: Annotated[
        str | None,
        typer.Option(
            help="further key of groups: folder, exif (serial number of the camera, else the day) or "
            "regex:PATTERN of the path, such as 'regex:(patient\\d+)_'"
        ),
    ] = None,
    folds: Annotated[int | None, typer.Option(min=2, help="cross-validation folds; default: none")] = None,
    seed: Annotated[int, typer.Option(min=0, help="random seed of the split")] = 0,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="retry the files that a finished run could not fetch")
    ] = False,
    local: LocalOption = False,
) -> None:
    """Prepare a labeled data set: deduplicate, split by microscope, and report label and image problems.

    The same command resumes a stopped run.
    """
    from jobs.cli.executors import make_executor
    from jobs.data.prepare import prepare as verb
    from scalp_core.curation.audit import Options

    keys = tuple(key.strip() for key in group.split(",") if key.strip())
    options = Options(task, symptom, split, split_by, keys, folds, seed)
    verb(source, out, options, group_by=group_by, retry_failed=retry_failed, executor=make_executor(local))


@app.command(rich_help_panel=_DATA, epilog="Example: scalp pseudonymize data/ export/ --key-file key.txt")
def pseudonymize(
    data: DataArg,
    out: OutArg,
    key_file: Annotated[
        str | None, typer.Option(help="file for the key of the codes; default: the key is discarded")
    ] = None,
) -> None:
    """Pseudonymize a prepared data set for sharing: remove names, metadata, times, sex and age."""
    from jobs.data.pseudonymize import pseudonymize as verb

    verb(data, out, key_file)


@app.command(
    rich_help_panel=_MODEL,
    epilog="Examples:\n\nscalp train data/ runs/first\n\n"
    "scalp train s3://clinic/data s3://clinic/run --workers 2:8 --set epochs=5",
)
def train(
    data: DataArg,
    run: Annotated[
        str, typer.Argument(help="run directory for checkpoints, curves and bundle, local or s3://")
    ],
    recipe: Annotated[
        str, typer.Option(help="training settings: default, paper, smoke, or the path of a .yaml file")
    ] = "default",
    workers: Annotated[
        str,
        typer.Option(
            metavar="auto|N|MIN:MAX",
            help="data-parallel workers; MIN:MAX scales with the cluster; auto: one per GPU, or 2 without",
        ),
    ] = "auto",
    device: DeviceOption = "auto",
    weights: Annotated[
        str | None,
        typer.Option(
            help="initial weights: imagenet, none, or a .safetensors or .pth file, local or s3://; "
            "default: as in the recipe"
        ),
    ] = None,
    fold: Annotated[
        int | None,
        typer.Option(
            min=0, help="fold of `scalp prepare --folds` to validate on, from 0; default: the val split"
        ),
    ] = None,
    tracking: Annotated[
        Literal["tensorboard", "mlflow", "none"],
        typer.Option(
            help="log of the training curves: tensorboard (in RUN/tensorboard), mlflow (needs "
            "MLFLOW_TRACKING_URI) or none"
        ),
    ] = "tensorboard",
    set_: SetOption = [],  # noqa: B006
) -> None:
    """Train the classifier with Ray, and write a bundle; the same command resumes a stopped run."""
    from jobs.train.driver import RECIPES
    from jobs.train.driver import train as verb
    from scalp_core.models.recipe import load_recipe

    overrides = [*set_, *([f"weights={weights}"] if weights else [])]
    verb(
        data,
        run,
        load_recipe(recipe, RECIPES, overrides),
        None if workers == "auto" else parse_range("--workers", workers),
        device,
        fold,
        tracking,
    )


@app.command(
    rich_help_panel=_MODEL,
    epilog="Examples:\n\nscalp tune data/ runs/tune --trials 32 --set epochs=5\n\n"
    "scalp train data/ runs/best --recipe runs/tune/best.yaml",
)
def tune(
    data: DataArg,
    out: OutArg,
    recipe: Annotated[
        str,
        typer.Option(help="settings held constant: default, paper, smoke, or the path of a .yaml file"),
    ] = "default",
    space: Annotated[
        str, typer.Option(help="search space: default, or the path of a .yaml file of lists and ranges")
    ] = "default",
    trials: Annotated[int, typer.Option(min=1, help="number of trials")] = 16,
    workers: Annotated[int, typer.Option(min=1, help="data-parallel workers per trial")] = 1,
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(min=0, help="random seed for proposing the trials")] = 0,
    set_: Annotated[
        list[str],
        typer.Option(
            "--set", metavar="KEY=VALUE", help="hold one setting constant at this value; may be repeated"
        ),
    ] = [],  # noqa: B006
) -> None:
    """Tune hyperparameters on the validation split, and write the best recipe to OUT/best.yaml.

    Optuna proposes the trials, and ASHA stops the worst ones early. The same command resumes a stopped run.
    """
    from jobs.train.driver import RECIPES
    from jobs.tune.driver import SPACES
    from jobs.tune.driver import tune as verb
    from scalp_core.models.recipe import load_recipe
    from scalp_core.models.search_space import load_space
    from scalp_core.settings import parse_overrides

    base = load_recipe(recipe, RECIPES, set_)
    verb(
        data, out, base, load_space(space, SPACES, base, parse_overrides(set_)), trials, workers, device, seed
    )


@app.command(rich_help_panel=_MODEL, epilog="Example: scalp evaluate runs/first data/ runs/first/test")
def evaluate(
    bundle: BundleArg,
    data: DataArg,
    out: OutArg,
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="split to evaluate")] = "test",
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    batch_size: BatchOption = 16,
    runtime: RuntimeOption = "auto",
    tta: Annotated[
        bool,
        typer.Option(
            "--tta",
            help="test-time augmentation: average over 4 flips, or over 8 flips and rotations if the model "
            "crops or pads; takes 4 or 8 times as long",
        ),
    ] = False,
    local: LocalOption = False,
) -> None:
    """Evaluate a bundle on a split: accuracy with confidence intervals, baselines, subgroups."""
    from jobs.cli.executors import make_executor
    from jobs.common.inference import ModelOptions
    from jobs.evaluate.driver import evaluate as verb

    options = ModelOptions(device, precision, batch_size, runtime, tta)
    verb(bundle, data, out, split, options, executor=make_executor(local))


@app.command(rich_help_panel=_MODEL, epilog="Example: scalp quantize runs/first data/ --max-drop 0.005")
def quantize(
    bundle: Annotated[str, typer.Argument(help="run directory of `scalp train`, local or s3://")],
    data: DataArg,
    max_drop: MaxDropOption = 0.01,
) -> None:
    """Add an int8 graph to a bundle, for faster inference on CPUs.

    It is refused unless the loss of kappa and coverage on the validation split is at most --max-drop.
    """
    from jobs.models.quantize import quantize as verb

    verb(bundle, data, max_drop=max_drop)


app.command(
    rich_help_panel=_GRADE,
    epilog="Examples:\n\nscalp grade runs/first monday.zip s3://clinic/2024/ graded/\n\n"
    "scalp grade models://scalp cases.csv s3://clinic/graded/ --models 2:16",
)(grade)
app.command(
    rich_help_panel=_GRADE,
    epilog="Examples:\n\nscalp results graded/ --by folder\n\n"
    "scalp results graded/ --only failed --to failed.csv\n\n"
    "scalp results graded/ --sql 'select grade, count(*) from results group by grade'",
)(results)
app.add_typer(models, name="models", rich_help_panel=_MODEL)
app.command(
    rich_help_panel=_SERVE,
    epilog="Examples:\n\nscalp serve runs/first\n\n"
    "scalp serve models://scalp --host 0.0.0.0 --keys keys.txt --audit audit/",
)(serve)
app.add_typer(keys, name="keys", rich_help_panel=_SERVE)
app.add_typer(audit, name="audit", rich_help_panel=_SERVE)
app.command(
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
    raise UserError(f"scalp export {' '.join(arguments)}: use scalp models pull MODEL OUT, without images")


@app.command(
    rich_help_panel=_MODEL,
    epilog="Example: scalp explain runs/first s3://clinic/2024/ explained/ --grade 3 --limit 20",
)
def explain(
    bundle: BundleArg,
    source: Annotated[
        str, typer.Argument(help="images: folder, prefix, .zip, .tar or .tar.gz; local or s3://")
    ],
    out: OutArg,
    grade: Annotated[
        int | None,
        typer.Option(min=0, max=3, help="grade to explain; default: the predicted grade of each image"),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, help="maximum number of images, evenly spread over the source")
    ] = 50,
    device: DeviceOption = "auto",
) -> None:
    """Draw Grad-CAM heatmaps: they show where the model looked, not where the lesion is."""
    from jobs.evaluate.explain import explain as verb

    verb(bundle, source, out, grade, limit, device)


@app.command(rich_help_panel=_SERVE, epilog="Example: scalp compare audit/")
def compare(
    audit: Annotated[
        str, typer.Argument(metavar="AUDIT", help="audit log: the folder of `scalp serve --audit`")
    ],
) -> None:
    """Compare the grades of a shadow or canary bundle with those of the serving bundle, from an audit log."""
    from jobs.evaluate.compare import compare as verb

    verb(audit)


def main() -> None:
    """Run the `scalp` command; print a user's mistake as one line on standard error, and exit with code 2."""
    try:
        app()
    except (UserError, ClusterError) as error:
        # An error from a Ray worker contains a traceback; the first line of its cause is the message.
        from jobs.common.console import printable

        line = str(getattr(error, "cause", error)).splitlines()[0]
        print(f"scalp: {printable(line)}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except SystemExit as ended:
        if ended.code == INTERRUPTED and not isinstance(ended, Detached):
            print("scalp: stopped; run the same command again to resume", file=sys.stderr)  # noqa: T201
        raise


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

"""The table of verbs: `scalp VERB --help` explains each. A verb's work is in the file of its name."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from cluster.local import ClusterError
from jobs.cli.audit import audit
from jobs.cli.bench import bench
from jobs.cli.grade import grade, results
from jobs.cli.keys import keys
from jobs.cli.models import models
from jobs.cli.serve import serve
from jobs.cli.submit import jobs, submit
from jobs.common.interrupt import INTERRUPTED, Detached
from jobs.common.options import (
    BatchOption,
    BundleArg,
    DataArg,
    DeviceOption,
    MaxDropOption,
    OutArg,
    PrecisionOption,
    RuntimeOption,
    SetOption,
)
from scalp_core.errors import UserError
from scalp_core.grades import SYMPTOMS

# The verbs' own modules are imported when they are called: Ray and PyTorch take seconds.

app = typer.Typer(
    help="Grades micro-keratin (미세각질, fine flaking) on scalp photographs: "
    "0 good, 1 mild, 2 moderate, 3 severe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
app.add_typer(models, name="models")
app.add_typer(keys, name="keys")
app.add_typer(audit, name="audit")
app.add_typer(jobs, name="jobs")
app.command()(serve)
app.command(context_settings={"allow_interspersed_args": False})(submit)


@app.command()
def synth(
    out: Annotated[str, typer.Argument(help="folder to write, local")],
    images: Annotated[int, typer.Option(min=1, help="photographs in all")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="the same seed gives the same bytes")] = 0,
    layout: Annotated[
        str,
        typer.Option(
            help="delivered, zipped, zipped-cp949, unmarked, nested, spaced, numbered, parents or nfd: "
            "the layouts in which the real set is found"
        ),
    ] = "delivered",
    set_: SetOption = [],  # noqa: B006
) -> None:
    """Makes synthetic scalp photographs in a layout of AI Hub set 216.

    --set takes label_noise, color_cast, lighting, hair_density, hair_density_spread, blur, devices and
    every_symptom (copies under each symptom, as in the real set).
    """
    from jobs.data.synth import synth as verb
    from scalp_core.settings import parse_overrides, parse_settings
    from scalp_core.synthetic.plan import SynthOptions

    values = {"images": images, "seed": seed, "layout": layout, **parse_overrides(set_)}
    verb(out, parse_settings(SynthOptions, values, "--set"))


@app.command()
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="AI Hub set 216, class folders, or a .csv or .parquet of uri,label[,group]; a folder, .zip, "
            ".tar or s3:// prefix"
        ),
    ],
    out: OutArg,
    task: Annotated[
        Literal["folder", "json", "unlabelled"] | None,
        typer.Option(help="folder: the folder's grade, as in the paper; json: the label file's value"),
    ] = None,
    symptom: Annotated[str, typer.Option(help=f"of AI Hub: {', '.join(SYMPTOMS)}")] = SYMPTOMS[0],
    split: Annotated[
        str, typer.Option(help="TRAIN:VAL:TEST; 7:2:1 as the paper says, 7:1:2 as its notebook did")
    ] = "7:2:1",
    split_by: Annotated[
        Literal["group", "official", "random"],
        typer.Option(help="official: as delivered, less the overlap; random: as the paper, which leaks"),
    ] = "group",
    group: Annotated[
        str, typer.Option(help="what makes one group, beside equal bytes: device, session, near_duplicate")
    ] = "device,session,near_duplicate",
    group_by: Annotated[
        str | None,
        typer.Option(
            help="folder, exif (camera's serial number, or the day), or regex:PATTERN of the path, such as "
            "'regex:(patient\\d+)_': what shares it is one group too"
        ),
    ] = None,
    folds: Annotated[int | None, typer.Option(min=2, help="also folds for cross-validation")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the split")] = 0,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="read again what a finished run could not fetch")
    ] = False,
) -> None:
    """Reads photographs into a manifest, deduplicated and split by device, with a report on the data."""
    from jobs.data.prepare import prepare as verb
    from scalp_core.curation.audit import Options

    keys = tuple(key.strip() for key in group.split(",") if key.strip())
    options = Options(task, symptom, split, split_by, keys, folds, seed)
    verb(source, out, options, group_by=group_by, retry_failed=retry_failed)


@app.command()
def pseudonymize(
    data: DataArg,
    out: OutArg,
    key_file: Annotated[
        str | None, typer.Option(help="keep the key of the codes here; without it, it is thrown away")
    ] = None,
) -> None:
    """Writes prepared photographs without names, metadata, times, sex and age, to be handed on."""
    from jobs.data.pseudonymize import pseudonymize as verb

    verb(data, out, key_file)


@app.command()
def train(
    data: DataArg,
    run: Annotated[str, typer.Argument(help="directory for checkpoints, curves and the bundle")],
    recipe: Annotated[
        str, typer.Option(help="default, paper, smoke, or the path of a .yaml file")
    ] = "default",
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="N|MIN:MAX",
            help="data-parallel; MIN:MAX follows the cluster; without it one for each GPU, else 2",
        ),
    ] = None,
    device: DeviceOption = "auto",
    weights: Annotated[
        str | None,
        typer.Option(help="first weights: imagenet, none, a .safetensors or .pth file, or s3:// of one"),
    ] = None,
    fold: Annotated[
        int | None,
        typer.Option(min=0, help="of `scalp prepare --folds`, to validate on"),
    ] = None,
    tracking: Annotated[
        Literal["tensorboard", "mlflow", "none"],
        typer.Option(
            help="tensorboard --logdir RUN/tensorboard shows the curves while it trains; mlflow needs "
            "MLFLOW_TRACKING_URI"
        ),
    ] = "tensorboard",
    set_: Annotated[list[str], typer.Option("--set", help="key=value over the recipe; may be repeated")] = [],  # noqa: B006
) -> None:
    """Fine-tunes the classifier on Ray; run it again to go on where it was stopped.

    --set changes a value of the recipe, for example --set epochs=5.
    """
    from jobs.train.driver import RECIPES
    from jobs.train.driver import train as verb
    from jobs.train.scaling import parse_range
    from scalp_core.models.recipe import load_recipe

    overrides = [*set_, *([f"weights={weights}"] if weights else [])]
    verb(
        data,
        run,
        load_recipe(recipe, RECIPES, overrides),
        parse_range("--workers", workers),
        device,
        fold,
        tracking,
    )


@app.command()
def tune(
    data: DataArg,
    out: OutArg,
    recipe: Annotated[
        str, typer.Option(help="what is not varied: default, paper, smoke, or the path of a .yaml file")
    ] = "default",
    space: Annotated[
        str, typer.Option(help="what is varied: default, or the path of a .yaml file of lists and ranges")
    ] = "default",
    trials: Annotated[int, typer.Option(min=1, help="recipes to draw")] = 16,
    workers: Annotated[int, typer.Option(min=1, help="of each trial, data-parallel")] = 1,
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(min=0, help="of the draws; the recipe has its own")] = 0,
    set_: Annotated[
        list[str], typer.Option("--set", help="key=value over the recipe, then not varied; may be repeated")
    ] = [],  # noqa: B006
) -> None:
    """Searches a recipe's settings on the validation part; run it again to go on where it was stopped.

    Ray Tune draws the recipes, ASHA stops the worse early, and OUT/best.yaml is for `scalp train --recipe`.
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


@app.command()
def evaluate(
    bundle: BundleArg,
    data: DataArg,
    out: OutArg,
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="which part")] = "test",
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    batch_size: BatchOption = 16,
    runtime: RuntimeOption = "auto",
    tta: Annotated[
        bool,
        typer.Option(
            "--tta",
            help="average four flips (eight flips and turns with crop or pad); as many times the work",
        ),
    ] = False,
) -> None:
    """Scores a bundle on a part of the data, with intervals, beside baselines and by slice."""
    from jobs.common.inference import ModelOptions
    from jobs.evaluate.driver import evaluate as verb

    verb(bundle, data, out, split, ModelOptions(device, precision, batch_size, runtime, tta))


@app.command()
def quantize(
    bundle: Annotated[str, typer.Argument(help="directory that `scalp train` wrote, local or s3://")],
    data: DataArg,
    max_drop: MaxDropOption = 0.01,
) -> None:
    """Adds an int8 graph to a bundle, for CPUs, unless validation images cannot show that it loses little."""
    from jobs.models.quantize import quantize as verb

    verb(bundle, data, max_drop=max_drop)


@app.command()
def export(
    bundle: BundleArg,
    photographs: Annotated[
        str, typer.Argument(help="folder, prefix or archive to compare on, local or s3://")
    ],
    out: OutArg,
    precision: Annotated[
        Literal["float", "int8"], typer.Option(help="float runs in bf16 or fp32; int8 needs `scalp quantize`")
    ] = "float",
    format_: Annotated[
        Literal["openvino"], typer.Option("--format", help="the fastest of those measured on CPUs")
    ] = "openvino",
) -> None:
    """Writes the model for other programs, checked against the bundle's weights on photographs."""
    from jobs.models.export import export as verb

    verb(bundle, photographs, out, precision, format_)


app.command()(grade)
app.command()(results)
# Spellings of earlier versions.
app.command("quantise", hidden=True)(quantize)
app.command("pseudonymise", hidden=True)(pseudonymize)


@app.command()
def explain(
    bundle: BundleArg,
    source: Annotated[str, typer.Argument(help="folder, prefix, .zip, .tar or .tar.gz; local or s3://")],
    out: OutArg,
    grade: Annotated[
        int | None,
        typer.Option(min=0, max=3, help="to explain; without it the one that each photograph gets"),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="photographs at most, spread over the source")] = 50,
    device: DeviceOption = "auto",
) -> None:
    """Pictures of what spoke for a grade (Grad-CAM): where the model looked, not where the lesion is."""
    from jobs.evaluate.explain import explain as verb

    verb(bundle, source, out, grade, limit, device)


@app.command()
def compare(
    audit: Annotated[str, typer.Argument(metavar="AUDIT", help="folder of the audit log of scalp serve")],
) -> None:
    """Shows what a bundle that was tried said beside the one that answered."""
    from jobs.evaluate.compare import compare as verb

    verb(audit)


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="folder for all that is made")] = "runs/demo",
    images: Annotated[int, typer.Option(min=200, help="synthetic photographs")] = 2000,
) -> None:
    """Goes the whole way on this machine: photographs, training, evaluation, S3, bulk, online."""
    from jobs.demo import demo as verb

    verb(out, images)


def main() -> None:
    """The `scalp` command. A user's mistake is one line on standard error and exit code 2."""
    try:
        app()
    except (UserError, ClusterError) as error:
        # An error that crossed Ray carries a traceback and advice on Ray; the line is the first of its cause.
        from jobs.common.console import printable

        line = str(getattr(error, "cause", error)).splitlines()[0]
        print(f"scalp: {printable(line)}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except SystemExit as ended:
        if ended.code == INTERRUPTED and not isinstance(ended, Detached):
            print("scalp: stopped; run the same command again to go on", file=sys.stderr)  # noqa: T201
        raise

"""Commands of models, `train` to `explain`: their arguments and options."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from jobs.cli.options import (
    BatchOption,
    BundleArg,
    DataArg,
    DeviceOption,
    JsonOption,
    KeyOption,
    MaxDropOption,
    OutArg,
    PrecisionOption,
    RunsHereOption,
    RuntimeOption,
    SetOption,
    parse_range,
)
from scalp_core.errors import UserError

# Each command imports its module when it is called: Ray and PyTorch take seconds to import.


def train(
    data: DataArg,
    run: Annotated[
        str, typer.Argument(help="run directory for checkpoints, curves and bundle, local or s3://")
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="training settings: default, cpu, one-gpu, eight-gpus, paper, smoke, or a .yaml file; "
            "default: default, or that of --init"
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="BUNDLE",
            help="bundle whose training is continued on DATA: its recipe and its weights; a run directory of "
            "`scalp train`, or models://NAME, models://NAME@VERSION",
        ),
    ] = None,
    workers: Annotated[
        str,
        typer.Option(
            metavar="auto|N|MIN:MAX",
            help="data-parallel workers; MIN:MAX scales with the cluster; "
            "auto: one per GPU; without, one with all cores",
        ),
    ] = "auto",
    device: DeviceOption = "auto",
    weights: Annotated[
        str | None,
        typer.Option(
            help="initial weights: imagenet, offline (of a pip package), none, a .safetensors or .pth file, "
            "or a bundle; local or s3://; default: as in the recipe"
        ),
    ] = None,
    fold: Annotated[
        int | None,
        typer.Option(
            min=0, help="fold of `scalp prepare --folds` to validate on, from 0; default: the val split"
        ),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="cross-validation: train one model per fold of `scalp prepare --folds`, in parallel where "
            "the cluster allows, and a bundle that learns from all of them",
        ),
    ] = None,
    tracking: Annotated[
        Literal["tensorboard", "mlflow", "none"],
        typer.Option(
            metavar="KIND",
            help="log of the training curves: tensorboard (in RUN/tensorboard), mlflow (needs "
            "MLFLOW_TRACKING_URI) or none",
        ),
    ] = "tensorboard",
    symptoms: Annotated[
        Literal["one", "all"] | None,
        typer.Option(
            help="all: also grade the other five symptoms that are labeled in DATA; default: as in the recipe"
        ),
    ] = None,
    local: Annotated[
        bool | None,
        typer.Option(
            "--local/--cluster",
            help="train in this process without Ray, or in Ray; default: in Ray if RAY_ADDRESS names a "
            "cluster, this machine has a GPU, or more than one worker is given, else in this process",
        ),
    ] = None,
    set_: SetOption = [],  # noqa: B006
) -> None:
    """Train the classifier, and write a bundle; the same command resumes a stopped run.

    On a cluster, on GPUs and with several workers, Ray Train runs the workers. One worker without a GPU runs
    in the process of the command. After a crash, either resumes by itself after the last epoch.
    """
    from jobs.cli.executors import runs_here
    from jobs.common import supervise

    worker_range = None if workers == "auto" else parse_range("--workers", workers)
    has_several = worker_range not in (None, (1, 1))
    if local and has_several:
        raise UserError(f"--local has one worker; omit --workers {workers}, or --local")
    here = runs_here(local, device, has_several)
    less_memory = "train in another RUN with --set accumulate=2, which needs less memory"
    progress = supervise.fork(less_memory).count_progress if here else lambda: None
    from jobs.train.driver import RECIPES
    from jobs.train.driver import train as verb
    from scalp_core.models.recipe import load_recipe, recipe_of_bundle

    options = {"weights": weights, "symptoms": symptoms}
    overrides = [*set_, *(f"{name}={value}" for name, value in options.items() if value)]
    if init is None:
        settings = load_recipe(recipe or "default", RECIPES, overrides)
    elif recipe or weights:
        raise UserError("--init takes recipe and weights from its bundle; omit --recipe and --weights")
    else:
        settings = recipe_of_bundle(init, overrides)
    if folds is None:
        verb(
            data,
            run,
            settings,
            worker_range,
            device,
            fold,
            tracking,
            local=here,
            progress=progress,
        )
        return
    if fold is not None:
        raise UserError("--folds trains all folds, and --fold one of them; give one of the two")
    from jobs.train.folds import train_folds

    train_folds(data, run, settings, folds, worker_range, device, tracking, local=here, progress=progress)


def tune(
    data: DataArg,
    out: OutArg,
    recipe: Annotated[
        str,
        typer.Option(
            help="settings held constant: default, cpu, one-gpu, eight-gpus, paper, smoke, or a .yaml file"
        ),
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


def evaluate(
    bundles: Annotated[
        list[str],
        typer.Argument(
            metavar="BUNDLE...",
            help="run directories of `scalp train`, local or s3://, or models://NAME, models://NAME@VERSION; "
            "later bundles are compared with the first",
        ),
    ],
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
    probe: Annotated[
        bool,
        typer.Option(
            " /--no-probe",
            show_default=False,
            help="omit the linear probe, a baseline that costs a forward pass over up to 2,000 training "
            "images and the split",
        ),
    ] = True,
    local: RunsHereOption = None,
    json_: JsonOption = False,
) -> None:
    """Evaluate a bundle on a split: accuracy with confidence intervals, baselines, subgroups.

    With several bundles, also print the paired differences from the first, with their intervals.
    """
    from jobs.cli.executors import SMALLER_BATCH, make_executor, runs_here
    from jobs.common.console import print_json
    from jobs.common.inference import ModelOptions

    options = ModelOptions(device, precision, batch_size, runtime, tta)
    executor = make_executor(runs_here(local, device), SMALLER_BATCH)
    if len(bundles) > 1:
        from jobs.evaluate.comparison import evaluate_models

        summary = evaluate_models(bundles, data, out, split, options, executor, probe)
    else:
        from jobs.evaluate.driver import evaluate as verb

        summary = verb(bundles[0], data, out, split, options, executor, probe)
    if json_:
        print_json(summary)


def improve(
    model: Annotated[str, typer.Argument(help="model to improve: models://NAME, with a promoted version")],
    labels: Annotated[str, typer.Argument(help="directory of the label log of `scalp review`")],
    data: Annotated[
        str,
        typer.Argument(
            help="output directory of `scalp prepare`, with the data of the promoted version; its splits stay"
        ),
    ],
    out: OutArg,
    promote: Annotated[
        bool,
        typer.Option(
            "--promote",
            help="promote the new version, if --max-drop and the model's promotion.yaml accept it; default: "
            "print the command that does",
        ),
    ] = False,
    max_drop: MaxDropOption = 0.01,
    key: KeyOption = None,
    why: Annotated[str, typer.Option(help="reason of the promotion, to record in the history")] = "",
    workers: Annotated[
        str, typer.Option(metavar="auto|N|MIN:MAX", help="data-parallel workers, as in `scalp train`")
    ] = "auto",
    device: DeviceOption = "auto",
    blind_only: Annotated[
        bool,
        typer.Option("--blind-only", help="leave out answers that a reader gave while seeing the model's"),
    ] = False,
    conflicts: Annotated[
        Literal["adjudicate", "soft"],
        typer.Option(
            help="images on which readers differ and none decides: adjudicate (left out until "
            "scalp review --adjudicate) or soft (label: share of the readers per grade)"
        ),
    ] = "adjudicate",
    set_: SetOption = [],  # noqa: B006
    json_: JsonOption = False,
) -> None:
    """Improve a model with the answers of readers: prepare, train, compare, and add the next version.

    Ends with what the round bought: kappa, referred images and wrong answers of both versions on the test
    split of DATA, with intervals of the differences. The same command resumes a stopped round.
    """
    from jobs.common.console import print_json
    from jobs.improve import RoundOptions
    from jobs.improve import improve as verb

    worker_range = None if workers == "auto" else parse_range("--workers", workers)
    options = RoundOptions(
        tuple(set_), worker_range, device, blind_only, promote, max_drop, why, conflicts, key
    )
    summary = verb(model, labels, data, out, options)
    if json_:
        print_json(summary)


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


def audit_labels(
    run: Annotated[str, typer.Argument(help="run directory of `scalp train --folds`, local or s3://")],
    out: OutArg,
    pictures: Annotated[int, typer.Option(min=0, help="maximum number of images in the report")] = 100,
) -> None:
    """List the labels that are most likely wrong, with their images, from out-of-fold answers."""
    from jobs.evaluate.audit_labels import audit_labels as verb

    verb(run, out, pictures)


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

"""Commands of data sets, `synth` to `pseudonymize`: their arguments and options."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from jobs.cli.options import (
    DataArg,
    OutArg,
    SetOption,
    with_old_names,
)
from scalp_core.grades import SYMPTOM_IDS, SYMPTOMS

PrepareCommand = with_old_names({"--task": "--label-source", "--split": "--ratio"})

# Each command imports its module when it is called: Ray and PyTorch take seconds to import.


def synth(
    out: Annotated[str, typer.Argument(help="output folder, local")],
    images: Annotated[int, typer.Option(min=1, help="number of images")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="random seed; the same seed gives the same bytes")] = 0,
    layout: Annotated[
        Literal["delivered", "zipped", "zipped-cp949"],
        typer.Option(
            metavar="LAYOUT",
            help="delivered: folders, as AI Hub unpacks them; zipped: one zip per folder; zipped-cp949: "
            "Training.zip and Validation.zip, as Korean Windows packs them",
        ),
    ] = "delivered",
    symptoms: Annotated[
        Literal["one", "all"],
        typer.Option(
            help="symptoms that the images show: one (micro-keratin; label files have random numbers of the "
            "other five, which are not drawn) or all (the six of AI Hub, each in four grades)"
        ),
    ] = "one",
    set_: SetOption = [],  # noqa: B006
) -> None:
    """Generate synthetic scalp images in a layout of AI Hub set 216.

    Keys of --set: label_noise, color_cast, lighting, devices, every_symptom (copies of each image under each
    symptom, as in the real set).
    """
    from jobs.data.synth import synth as verb
    from scalp_core.settings import parse_settings
    from scalp_core.synthetic.plan import SynthOptions

    values = {"images": images, "seed": seed, "layout": layout, "symptoms": symptoms}
    verb(out, parse_settings(SynthOptions, values, "scalp synth", set_))


def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="folder, .zip, .tar or s3:// prefix with AI Hub set 216 or one folder per class; or a .csv "
            "or .parquet table with columns uri, label and optionally group and other symptoms; or LABELS of "
            "`scalp review`"
        ),
    ],
    out: OutArg,
    label_source: Annotated[
        Literal["folder", "json", "unlabelled"] | None,
        typer.Option(
            metavar="LABELS",  # the names take half a line
            help="source of labels: folder (name of the folder, as in the paper), json (value in AI Hub's "
            "label file) or unlabelled; default: folder, or the column label of a table",
        ),
    ] = None,
    symptom: Annotated[
        str,
        typer.Option(
            help="symptom of the label, in English or Korean: "
            + "; ".join(f"{name}, {korean}" for name, korean in zip(SYMPTOM_IDS, SYMPTOMS, strict=True))
        ),
    ] = SYMPTOM_IDS[0],
    ratio: Annotated[
        str,
        typer.Option(
            help="sizes of the splits, TRAIN:VAL:TEST; the paper states 7:2:1, its notebook uses 7:1:2"
        ),
    ] = "7:2:1",
    split_by: Annotated[
        Literal["group", "official", "random"],
        typer.Option(
            metavar="METHOD",
            help="split method: group (no group is in two splits), official (as delivered, without the "
            "overlap) or random (as in the paper; it leaks)",
        ),
    ] = "group",
    group: Annotated[
        str,
        typer.Option(
            help="keys that join images into one group, comma-separated, in addition to equal bytes: device, "
            "session, near_duplicate"
        ),
    ] = "device, session, near_duplicate",
    group_by: Annotated[
        str | None,
        typer.Option(
            help="further key of groups: folder, or regex:PATTERN of the path, such as 'regex:(patient\\d+)_'"
        ),
    ] = None,
    folds: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="cross-validation folds; default: none")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="random seed of the split")] = 0,
    extend: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="prepared data to which the images of LABELS are added; its images keep labels and splits, "
            "and new ones go to train, unless their group is in val or test",
        ),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="retry the files that a finished run could not fetch")
    ] = False,
    blind_only: Annotated[
        bool,
        typer.Option(
            "--blind-only",
            help="leave out answers that a reader gave in `scalp review` while seeing the model's answer; "
            "for an evaluation of that model",
        ),
    ] = False,
    conflicts: Annotated[
        Literal["adjudicate", "soft"],
        typer.Option(
            metavar="RULE",
            help="of a label log, images on which readers differ and none decides: adjudicate (left out "
            "until scalp review --adjudicate) or soft (label: share of the readers per grade; train alone)",
        ),
    ] = "adjudicate",
    local: Annotated[
        bool | None,
        typer.Option(
            "--local/--cluster",
            help="run in this process without Ray, or in Ray; default: in this process if SOURCE is a local "
            "folder or archive of less than 128 MiB, no label log, and RAY_ADDRESS is not set; else in Ray",
        ),
    ] = None,
) -> None:
    """Prepare a labeled data set: deduplicate, split by microscope, and report label and image problems.

    The same command resumes a stopped run.
    """
    from jobs.cli.executors import make_executor, runs_here
    from jobs.data.prepare import is_small
    from jobs.data.prepare import prepare as verb
    from scalp_core.curation.audit import Options

    keys = tuple(key.strip() for key in group.split(",") if key.strip())
    symptom = dict(zip(SYMPTOM_IDS, SYMPTOMS, strict=True)).get(symptom, symptom)
    options = Options(label_source, symptom, ratio, split_by, keys, folds, seed, group_by, extend)
    here = runs_here(local, "cpu", needs_cluster=not is_small(source))
    executor = make_executor(here, "use a machine with more memory, or --cluster")
    verb(
        source,
        out,
        options,
        retry_failed=retry_failed,
        blind_only=blind_only,
        conflicts=conflicts,
        executor=executor,
    )


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

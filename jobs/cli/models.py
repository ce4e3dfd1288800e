"""`scalp models`: commands of the model registry; `jobs.models.driver` does the work."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli.options import (
    BundleArg,
    DeviceOption,
    JsonOption,
    KeyOption,
    MaxDropOption,
    OutArg,
    with_old_names,
)

models = typer.Typer(
    help="Manage numbered versions of models. models://NAME is the promoted version, in other commands too.",
    epilog="Example: scalp models list",
    no_args_is_help=True,
)

RegistryOption = Annotated[
    str | None,
    typer.Option(help="registry, a folder or s3:// prefix; default: SCALP_MODELS in the environment"),
]
WhyOption = Annotated[str, typer.Option(help="reason to record in the history")]


@models.command("list", epilog="Example: scalp models list --registry s3://clinic/models")
def models_list(
    name: Annotated[str | None, typer.Argument(help="model to list; default: all")] = None,
    registry: RegistryOption = None,
    json_: JsonOption = False,
) -> None:
    """List versions, their metrics, and the promoted version of each model."""
    from jobs.common.console import print_json
    from jobs.models.driver import list_models as verb

    versions = verb(name, registry)
    if json_:
        print_json(versions)


@models.command("add", epilog="Example: scalp models add runs/first scalp")
def models_add(
    run: Annotated[str, typer.Argument(help="run directory of `scalp train`, local or s3://")],
    name: Annotated[str, typer.Argument(help="name of the model; a new name creates a model")],
    registry: RegistryOption = None,
) -> None:
    """Add a run's bundle as the next version; a bundle that is a version already adds nothing."""
    from jobs.models.driver import add as verb

    verb(run, name, registry)


@models.command(
    "promote",
    cls=with_old_names({"--leaky-too": "--allow-leaky"}),
    epilog="Examples:\n\nscalp models promote scalp@1\n\n"
    "scalp models promote scalp@latest --data data/ --why retrained",
)
def models_promote(
    model: Annotated[str, typer.Argument(help="NAME@VERSION, or NAME@latest")],
    data: Annotated[
        str | None,
        typer.Option(
            help="output directory of `scalp prepare`; both versions are compared on its test split"
        ),
    ] = None,
    max_drop: MaxDropOption = 0.01,
    untested: Annotated[
        bool, typer.Option("--untested", help="promote without a comparison; needs --why")
    ] = False,
    why: WhyOption = "",
    allow_leaky: Annotated[
        bool,
        typer.Option(
            "--allow-leaky", help="accept a version whose metrics are too high, from a split that leaks"
        ),
    ] = False,
    key: KeyOption = None,
    device: DeviceOption = "auto",
    registry: RegistryOption = None,
) -> None:
    """Promote a version to models://NAME, unless it may be worse than the promoted one.

    The first version of a model is promoted without a comparison; a later one needs --data or --untested.
    If the registry holds NAME/promotion.yaml, each of its rules must pass on --data.
    """
    from jobs.models.driver import promote as verb

    verb(
        model,
        data=data,
        max_drop=max_drop,
        untested=untested,
        why=why,
        leaky_too=allow_leaky,
        key=key,
        device=device,
        registry=registry,
    )


@models.command("rollback", epilog="Example: scalp models rollback scalp --why 'too many referrals'")
def models_rollback(
    name: Annotated[str, typer.Argument(help="name of the model")],
    why: WhyOption = "",
    key: KeyOption = None,
    registry: RegistryOption = None,
) -> None:
    """Roll back to the version promoted before; repeat to go back further."""
    from jobs.models.driver import rollback as verb

    verb(name, why, registry, key)


@models.command("bom", epilog="Example: scalp models bom models://scalp@2")
def models_bom(model: BundleArg, registry: RegistryOption = None) -> None:
    """Print the bill of materials of a bundle: files, data, libraries and model card, in CycloneDX 1.6."""
    from jobs.common.console import print_json
    from jobs.models.driver import make_bom as verb

    print_json(verb(model, registry))


@models.command("pull", epilog="Example: scalp models pull models://scalp@2 s3://clinic/scalp-2")
def models_pull(model: BundleArg, out: OutArg, registry: RegistryOption = None) -> None:
    """Copy a bundle to another place, verified by its hashes, for example for other programs.

    model.xml and model.bin run in OpenVINO; bundle.json holds size, resize, temperature and grade names.
    """
    from jobs.models.driver import pull as verb

    verb(model, out, registry)

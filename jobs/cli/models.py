"""`scalp models`: the verbs of the registry; their work is in `models`."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.common.options import DeviceOption, MaxDropOption

models = typer.Typer(
    help="Numbered versions of models, and which is promoted: models://NAME for every other verb.",
    no_args_is_help=True,
)

RegistryOption = Annotated[
    str | None, typer.Option(help="folder or s3:// prefix; without it what SCALP_MODELS names")
]
WhyOption = Annotated[str, typer.Option(help="for the history")]


@models.command("list")
def models_list(
    name: Annotated[str | None, typer.Argument(help="of one model; without it all")] = None,
    registry: RegistryOption = None,
) -> None:
    """Shows every version, its figures, and which is promoted."""
    from jobs.models.driver import list_models as verb

    verb(name, registry)


@models.command("add")
def models_add(
    run: Annotated[str, typer.Argument(help="directory that `scalp train` wrote, local or s3://")],
    name: Annotated[str, typer.Argument(help="of the model; a new one is made")],
    registry: RegistryOption = None,
) -> None:
    """Copies a run's bundle as the next version; the same again is the version that it is already."""
    from jobs.models.driver import add as verb

    verb(run, name, registry)


@models.command("promote")
def models_promote(
    model: Annotated[str, typer.Argument(help="NAME@VERSION, or NAME@latest")],
    data: Annotated[
        str | None,
        typer.Option(help="directory that `scalp prepare` wrote; both versions grade its test split"),
    ] = None,
    max_drop: MaxDropOption = 0.01,
    untested: Annotated[
        bool, typer.Option("--untested", help="promote without a comparison; needs --why")
    ] = False,
    why: WhyOption = "",
    leaky_too: Annotated[
        bool, typer.Option("--leaky-too", help="also one whose figures flatter, of a leaky split")
    ] = False,
    device: DeviceOption = "auto",
    registry: RegistryOption = None,
) -> None:
    """Makes a version the one that models://NAME stands for, unless it may be worse than the present one.

    The first version of a model is promoted without a comparison.
    """
    from jobs.models.driver import PromoteOptions
    from jobs.models.driver import promote as verb

    options = PromoteOptions(why, data, max_drop, untested, leaky_too, device)
    verb(model, options, registry)


@models.command("rollback")
def models_rollback(
    name: Annotated[str, typer.Argument(help="of the model")],
    why: WhyOption = "",
    registry: RegistryOption = None,
) -> None:
    """Goes back to the version promoted before; once more, to the one before that."""
    from jobs.models.driver import rollback as verb

    verb(name, why, registry)

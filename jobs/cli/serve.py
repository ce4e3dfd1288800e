"""`scalp serve`: its options, the most used settings of the endpoint; `scalp store`: its stored images."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from jobs.cli.options import BundleArg, DeviceOption, PrecisionOption, RuntimeOption, with_old_names
from scalp_core.errors import UserError

ServeCommand = with_old_names({"--open-to-network-without-keys": "--allow-anonymous"})


def serve(
    bundle: BundleArg,
    host: Annotated[
        str, typer.Option(help="address to listen on; other than loopback needs --keys")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")] = 8000,
    grpc_port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help="port of --host for the Open Inference Protocol over gRPC; default: no gRPC",
        ),
    ] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    runtime: RuntimeOption = "auto",
    keys: Annotated[
        str | None,
        typer.Option(help="key file, with lines of `scalp keys new`; default: SCALP_KEYS in the environment"),
    ] = None,
    open_to_network: Annotated[
        bool, typer.Option("--allow-anonymous", help="answer any client that reaches --host")
    ] = False,
    tls_cert: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="PEM file with certificate chain and private key; serves https only"
        ),
    ] = None,
    audit: Annotated[str | None, typer.Option(help="folder for the audit log; default: no audit log")] = None,
    shadow: Annotated[
        str | None,
        typer.Option(metavar="BUNDLE", help="second bundle, which grades copies of requests; needs --audit"),
    ] = None,
    canary: Annotated[
        str | None,
        typer.Option(
            metavar="BUNDLE", help="second bundle, which answers some of the requests; needs --audit"
        ),
    ] = None,
    share: Annotated[
        float, typer.Option(min=0.001, max=1, help="fraction of requests for --shadow or --canary")
    ] = 0.1,
    bulk_source: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PREFIX", help="folder or s3:// prefix that POST /v1/bulk may grade; may be repeated"
        ),
    ] = None,
    bulk_out: Annotated[
        str | None, typer.Option(metavar="PREFIX", help="folder or s3:// prefix for the output of bulk runs")
    ] = None,
    review: Annotated[
        str | None,
        typer.Option(
            metavar="GRADED",
            help="output of `scalp grade`, or the folder of --store, whose referred images readers answer at "
            "/review; needs --keys",
        ),
    ] = None,
    review_labels: Annotated[
        str | None, typer.Option(metavar="LABELS", help="directory of the label log of --review")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="folder or s3:// prefix that keeps referred images whose requests have keep=true; default: "
            "no image is kept",
        ),
    ] = None,
    settings: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="YAML file with settings of serving/settings.py; options override it"
        ),
    ] = None,
) -> None:
    """Serve grades of images over HTTP, with a web page at /."""
    from scalp_core.settings import load_yaml, parse_settings
    from serving.app import serve as verb
    from serving.settings import Settings

    if shadow and canary:
        raise UserError("--shadow and --canary exclude each other; try one bundle at a time")
    values, origin = load_yaml("settings", settings) if settings else ({}, "scalp serve")
    given: dict[str, Any] = {
        "device": device if device != "auto" else None,
        "precision": precision if precision != "auto" else None,
        "runtime": runtime if runtime != "auto" else None,
        "keys": {"file": keys, "open_to_network_without_keys": open_to_network}
        if keys or open_to_network
        else None,
        "front": {"tls_certificate": tls_cert} if tls_cert else None,
        "audit": {"folder": audit} if audit else None,
        "candidate": {"mode": "shadow" if shadow else "canary", "share": share} if shadow or canary else None,
        "review": {name: value for name, value in (("graded", review), ("labels", review_labels)) if value}
        or None,
        "store": {"folder": store} if store else None,
        "bulk": {"sources": bulk_source or [], "out": bulk_out or ""} if bulk_source or bulk_out else None,
    }
    for name, value in given.items():
        if isinstance(value, dict):
            values[name] = (values.get(name) or {}) | value
        elif value is not None:
            values[name] = value
    if review and "labels" not in values["review"]:
        raise UserError(f"--review {review} needs the directory of its label log; add --review-labels LABELS")
    if review_labels and "graded" not in values["review"]:
        raise UserError(f"--review-labels {review_labels} has no images to review; add --review GRADED")
    verb(bundle, host, port, parse_settings(Settings, values, origin), shadow or canary, grpc_port)


store = typer.Typer(
    help="Remove images from the store of `scalp serve --store`.",
    epilog="Example: scalp store remove s3://clinic/kept 9f86d081884c7d659a2f",
    no_args_is_help=True,
)


@store.callback()
def common() -> None:
    """Keep `remove` a subcommand, although it is the only one."""


@store.command("remove", epilog="Example: scalp store remove s3://clinic/kept 9f86d081884c7d659a2f")
def store_remove(
    folder: Annotated[str, typer.Argument(metavar="STORE", help="folder of `scalp serve --store`")],
    image_ids: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE_ID...", help="ids of stored images: `kept.image_id` of answers, or the audit log"
        ),
    ],
) -> None:
    """Remove images and their result rows from a store, such as after a consent was withdrawn."""
    from scalp_core.results.store import remove_images

    for image_id in remove_images(folder, image_ids):
        print(f"removed {image_id}")  # noqa: T201

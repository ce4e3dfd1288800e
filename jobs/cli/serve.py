"""`scalp serve`: its options, which are settings of the endpoint that are asked for most."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.common.options import BundleArg, DeviceOption, PrecisionOption, RuntimeOption
from scalp_core.errors import UserError


def serve(
    bundle: BundleArg,
    host: Annotated[str, typer.Option(help="address to listen on; beyond loopback with keys")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    runtime: RuntimeOption = "auto",
    keys: Annotated[
        str | None, typer.Option(help="file of `scalp keys new`; or SCALP_KEYS in the environment")
    ] = None,
    open_to_network: Annotated[
        bool, typer.Option("--open-to-network-without-keys", help="answer everybody who reaches --host")
    ] = False,
    tls_cert: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="PEM file with certificate chain and private key; answers https only"
        ),
    ] = None,
    audit: Annotated[
        str | None, typer.Option(help="folder for the audit log; without it there is none")
    ] = None,
    shadow: Annotated[
        str | None, typer.Option(metavar="BUNDLE", help="another one that grades copies; with --audit")
    ] = None,
    canary: Annotated[
        str | None, typer.Option(metavar="BUNDLE", help="another one that answers a share; with --audit")
    ] = None,
    share: Annotated[float, typer.Option(min=0.001, max=1, help="of --shadow or --canary")] = 0.1,
    bulk_source: Annotated[
        list[str] | None,
        typer.Option(metavar="PREFIX", help="s3:// or folder that POST /v1/bulk may grade; may be repeated"),
    ] = None,
    bulk_out: Annotated[str | None, typer.Option(metavar="PREFIX", help="where bulk grading writes")] = None,
    settings: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="YAML with all settings of serving/settings.py; options go first"),
    ] = None,
) -> None:
    """Answers photographs over HTTP, with a page at /."""
    from scalp_core.settings import load_yaml, parse_settings
    from serving.app import serve as verb
    from serving.settings import Settings

    if shadow and canary:
        raise UserError("--shadow and --canary: try one bundle at a time")
    values, origin = load_yaml("settings", settings, Path()) if settings else ({}, "scalp serve")
    asked: dict[str, Any] = {
        "device": device if device != "auto" else None,
        "precision": precision if precision != "auto" else None,
        "runtime": runtime if runtime != "auto" else None,
        "keys": {"file": keys, "open_to_network_without_keys": open_to_network}
        if keys or open_to_network
        else None,
        "front": {"tls_certificate": tls_cert} if tls_cert else None,
        "audit": {"folder": audit} if audit else None,
        "candidate": {"mode": "shadow" if shadow else "canary", "share": share} if shadow or canary else None,
        "bulk": {"sources": bulk_source or [], "out": bulk_out or ""} if bulk_source or bulk_out else None,
    }
    for name, value in asked.items():
        if isinstance(value, dict):
            values[name] = (values.get(name) or {}) | value
        elif value is not None:
            values[name] = value
    verb(bundle, host, port, parse_settings(Settings, values, origin), shadow or canary)

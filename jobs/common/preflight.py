"""Preflight checks of a cluster: whether each node can read the sources and write the output."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping, Sequence

import pyarrow as pa
import ray

from cluster.nodes import run_on_each_node
from cluster.resources import is_joined
from jobs.common.errors import print_error
from scalp_core import storage
from scalp_core.errors import UserError

# Above this, Ray stops storing on a disk, and tasks wait without end.
_FULL_SHARE = 0.95
_RETRY_TIMEOUT_S = 3.0


def check_nodes(reads: Sequence[str], out: str) -> None:
    """Check access to sources and output on each node of a joined cluster; does nothing on a local Ray.

    Raises:
        UserError: A node failed a check: the first problem; the others are printed, one per line.
        ClusterError: A node cannot run a task of scalp.
    """
    if not is_joined():
        return
    mark = storage.join(out, f".preflight-{uuid.uuid4().hex[:12]}")
    storage.write(mark, b"scalp")
    try:
        problems = run_on_each_node(_find_problems, list(reads), mark)
    finally:
        storage.remove_file(mark)
    lines = [f"node {node}: {problem}" for node, of_node in problems.items() for problem in of_node]
    for line in lines[1:]:
        print_error(line)
    if lines:
        raise UserError(lines[0])


def examples(parts: Mapping[str, pa.Table]) -> list[str]:
    """URI of the first image of each split of a manifest, as samples for `check_nodes`."""
    return sorted({part["uri"][0].as_py() for part in parts.values() if part.num_rows})


def _find_problems(reads: list[str], mark: str) -> list[str]:
    """Problems of this node, one line each."""
    lines = []
    with storage.retry_timeout(_RETRY_TIMEOUT_S):
        for uri in reads:
            try:
                check_readable(uri)
            except (OSError, UserError) as error:
                lines.append(str(error))
        try:
            if not storage.exists(mark):
                out = mark.rpartition("/")[0]
                lines.append(
                    f"{out} is not shared with the driver's machine; choose an OUT in S3 or on a shared disk"
                )
            else:
                own = f"{mark}-{uuid.uuid4().hex[:12]}"
                storage.write(own, b"scalp")
                storage.remove_file(own)
        except (OSError, UserError) as error:
            lines.append(str(error))
    disk = shutil.disk_usage(ray.get_runtime_context().get_temp_dir())
    if disk.used / disk.total > _FULL_SHARE:
        lines.append(
            f"the disk of Ray's folder is {disk.used / disk.total:.0%} full, and Ray stops storing above "
            f"{_FULL_SHARE:.0%}; free some space"
        )
    return lines


def check_readable(uri: str) -> None:
    """Read the first byte of a file, or list the first file of a folder.

    Raises:
        OSError: It cannot be read.
        UserError: It cannot be read, or does not exist.
    """
    if storage.is_file(uri):
        with storage.explain_errors(uri), storage.open_file(uri) as file:
            file.read(1)
    elif next(storage.walk(uri), None) is None:
        raise UserError(
            f"{uri} does not exist, or is empty; copy it to where every node can read it, such as S3"
        )

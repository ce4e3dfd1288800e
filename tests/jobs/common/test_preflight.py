"""Preflight checks of a cluster's nodes: what one node reports, and what refuses the command."""

from __future__ import annotations

from collections import namedtuple
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.common import preflight
from jobs.common.preflight import check_nodes
from scalp_core.errors import UserError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def disk(monkeypatch, tmp_path) -> dict[str, int]:
    """Used percent of the disk of this node, on which Ray stores."""
    disk = {"used": 50}
    context = SimpleNamespace(get_temp_dir=lambda: str(tmp_path))
    monkeypatch.setattr(preflight.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(
        preflight.shutil, "disk_usage", lambda _: Usage(100, disk["used"], 100 - disk["used"])
    )
    return disk


@pytest.fixture
def joined(disk, monkeypatch) -> list[str]:
    """A joined cluster whose nodes are this process; the list has their addresses."""
    nodes = ["10.0.0.1"]
    monkeypatch.setattr(preflight, "is_joined", lambda: True)
    monkeypatch.setattr(
        preflight,
        "run_on_each_node",
        lambda function, *arguments: {node: function(*arguments) for node in nodes},
    )
    return nodes


@pytest.fixture
def places(tmp_path) -> tuple[Path, Path]:
    """A source folder with one file, and an output directory."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "a.jpg").write_bytes(b"jpeg")
    return source, out


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_good_node_passes_and_no_file_remains(joined, places):
    source, out = places
    check_nodes([str(source), str(source / "a.jpg")], str(out))
    assert files(out) == []


@pytest.mark.promise("README: nodes are checked before long work")
def test_a_source_that_a_node_cannot_find_refuses_the_command(joined, places):
    source, out = places
    with pytest.raises(UserError, match=rf"^node 10.0.0.1: cannot read {source}/b.jpg: it does not exist"):
        check_nodes([str(source), str(source / "b.jpg")], str(out))
    assert files(out) == []


def test_a_source_that_a_node_may_not_read_refuses_the_command(joined, places, monkeypatch):
    """As with other credentials there; root reads any file."""
    source, out = places

    class Unreadable(BytesIO):
        def read(self, *_):
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(preflight.storage, "open_file", lambda _: Unreadable())
    with pytest.raises(UserError, match=f"node 10.0.0.1: cannot read {source}/a.jpg"):
        check_nodes([str(source / "a.jpg")], str(out))


def test_an_empty_folder_refuses_the_command(joined, places):
    source, out = places
    (source / "a.jpg").unlink()
    with pytest.raises(UserError, match="does not exist, or is empty"):
        check_nodes([str(source)], str(out))


def test_an_output_on_a_disk_that_a_node_does_not_share_refuses_the_command(joined, places, monkeypatch):
    """As on a node with another disk: the mark of the driver is missing there."""
    source, out = places

    def on_another_machine(function, reads, mark):
        there = Path(mark)
        there.rename(out / "elsewhere")
        try:
            return {"10.0.0.2": function(reads, mark)}
        finally:
            (out / "elsewhere").rename(there)

    monkeypatch.setattr(preflight, "run_on_each_node", on_another_machine)
    with pytest.raises(UserError, match=rf"^node 10.0.0.2: {out} is not shared with the driver's machine"):
        check_nodes([str(source)], str(out))
    assert files(out) == []


def test_an_output_that_a_node_cannot_write_refuses_the_command(joined, places, monkeypatch):
    source, out = places
    write = preflight.storage.write
    writes: list[str] = []

    def only_the_driver_writes(uri, data):
        if writes:
            raise PermissionError(13, "Permission denied", uri)
        writes.append(uri)
        write(uri, data)

    monkeypatch.setattr(preflight.storage, "write", only_the_driver_writes)
    with pytest.raises(UserError, match="node 10.0.0.1: .*Permission denied"):
        check_nodes([str(source)], str(out))


@pytest.mark.parametrize(("used", "refused"), [(95, False), (96, True)])
def test_a_full_disk_under_ray_refuses_the_command(joined, places, disk, used, refused):
    source, out = places
    disk["used"] = used
    if not refused:
        check_nodes([str(source)], str(out))
        return
    with pytest.raises(UserError, match="the disk of Ray's folder is 96% full"):
        check_nodes([str(source)], str(out))


def test_the_first_problem_is_the_error_and_the_others_are_printed(joined, places, disk, capsys):
    source, out = places
    disk["used"] = 99
    joined.append("10.0.0.2")
    with pytest.raises(UserError, match="^node 10.0.0.1: .*b.jpg: it does not exist"):
        check_nodes([str(source / "b.jpg")], str(out))
    printed = capsys.readouterr().err.splitlines()
    problems = [line for line in printed if line.startswith("error: ")]
    assert [line.split(": ")[1] for line in problems] == ["node 10.0.0.1", "node 10.0.0.2", "node 10.0.0.2"]


def test_a_local_ray_is_not_checked(disk, places, monkeypatch):
    monkeypatch.setattr(preflight, "is_joined", lambda: False)
    monkeypatch.setattr(preflight, "run_on_each_node", None)
    check_nodes(["/nowhere"], str(places[1]))

"""No command removes or overwrites what it did not make, whatever directory it is given as its output.

The table of verbs below is compared with the command line's own: a new verb that is not in it fails here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import typer

from jobs.cli.main import app, main
from jobs.data.synth import synth
from scalp_core.errors import UserError
from scalp_core.storage import outputs
from scalp_core.synthetic.plan import SynthOptions
from tests.support.images import jpeg

# Arguments of every verb that makes an output directory, and the marker of that directory. OUT is where it is
# made, SOURCE what is read. There is neither a bundle nor data: a wrong OUT is refused before they
# are opened.
WRITES = {
    "synth": ("synth OUT", "synth"),
    "prepare": ("prepare SOURCE OUT", "prepare"),
    "train": ("train SOURCE OUT", "train"),
    "train --folds": ("train SOURCE OUT --folds 2", "train --folds"),
    "tune": ("tune SOURCE OUT", "tune"),
    "evaluate": ("evaluate BUNDLE SOURCE OUT", "evaluate"),
    "improve": ("improve models://scalp SOURCE s3://clinic/data OUT", "improve"),
    "explain": ("explain BUNDLE SOURCE OUT", "explain"),
    "models pull": ("models pull SOURCE OUT", "models pull"),
    "pseudonymize": ("pseudonymize SOURCE OUT", "pseudonymize"),
    "pseudonymise": ("pseudonymise SOURCE OUT", "pseudonymize"),
    "grade": ("grade BUNDLE SOURCE OUT", "grade"),
    "demo": ("demo --out OUT", "demo"),
    "bench engine": ("bench engine --out OUT", "bench engine"),
    "audit-labels": ("audit-labels SOURCE OUT", "audit-labels"),
    "review": ("review SOURCE OUT --reader kim", "review"),
    "neighbors": ("neighbors SOURCE OUT --bundle BUNDLE --data DATA", "review"),
    "calibrate": ("calibrate BUNDLE SOURCE OUT", "calibrate"),
    "bench decisions": ("bench decisions --out OUT", "bench decisions"),
    "bench serve": ("bench serve --url http://127.0.0.1:1 --out OUT", "bench serve-url"),
}
# These make none.
WRITE_NO_DIRECTORY = {
    "serve": "a private audit folder: test_audit_log",
    "submit": "runs a verb of this table; its log: test_entry",
    "quantize": "adds to a bundle: test_quantize, test_graphs",
    "quantise": "hidden alias of quantize",
    "results": "one file, with --output: test_results",
    "compare": "reads",
    "export": "names models pull: test_pull",
    "audit verify": "reads",
    "models list": "reads",
    "models bom": "prints",
    "models add": "a version that nobody has: test_registry",
    "models promote": "an entry that nobody has: test_registry_history",
    "models rollback": "an entry that nobody has: test_registry_history",
    "keys new": "prints",
    "keys list": "prints",
    "keys revoke": "lines of the key file: test_key_file",
    "store remove": "files of the named images, in a marked store alone: test_store",
    "doctor": "prints",
    "jobs list": "prints",
    "jobs logs": "prints",
    "jobs stop": "prints",
}

MINE = (
    "thesis.tex", "report.html", "summary.json", "run.json", "scan.jpg", "work/notes.txt",
    "checkpoints/a.bin", "bundle/bundle.json", "photographs/1.jpg", "manifest.parquet",
)  # fmt: skip

each_verb = pytest.mark.parametrize("verb", WRITES)
each_with_a_source = pytest.mark.parametrize(
    "verb", [verb for verb, case in WRITES.items() if "SOURCE" in case[0]]
)


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch):
    """A wrong OUT is refused before Ray starts."""

    def started(*_, **__):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", started)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.fixture
def mine(tmp_path) -> Path:
    """Folder of a user's files, with names that commands use too."""
    folder = tmp_path / "mine"
    for name in MINE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(1) if name.endswith("jpg") else b'{"by": "hand"}')
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(verb: str, out: Path, source: Path, monkeypatch, capsys) -> str:
    """Run a command that must exit with code 2; return its error and hint in one line."""
    names = {"OUT": str(out), "SOURCE": str(source), "BUNDLE": str(out.parent / "bundle")}
    words = [names.get(word, word) for word in WRITES[verb][0].split()]
    monkeypatch.setattr(sys, "argv", ["scalp", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code == 2, printed
    error, *hint = printed.err.splitlines()
    assert error.startswith("error: ") and len(hint) <= 1
    assert printed.out == ""
    return "; ".join([error, *(line.removeprefix("hint:  ") for line in hint)])


def commands(group: Any, before: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}"


def test_the_tables_name_every_command():
    known = {verb.partition(" --")[0] for verb in (*WRITES, *WRITE_NO_DIRECTORY)}
    assert known == set(commands(typer.main.get_command(app)))


@each_verb
def test_a_folder_of_somebody_else_is_refused_and_kept(verb, mine, tmp_path, monkeypatch, capsys):
    before = content(mine)
    line = refused(verb, mine, tmp_path / "source", monkeypatch, capsys)
    assert f"{mine} is not empty" in line and "choose a new" in line, line
    assert content(mine) == before


@each_verb
def test_the_results_of_another_verb_are_refused_and_kept(verb, tmp_path, monkeypatch, capsys):
    made = tmp_path / "made"
    outputs.claim_output(str(made), "another")
    before = content(made)
    assert "holds results of scalp another" in refused(verb, made, tmp_path / "source", monkeypatch, capsys)
    assert content(made) == before


@each_with_a_source
@pytest.mark.parametrize("place", [".", "deep/er", ".."], ids=["the source", "inside it", "around it"])
def test_an_output_that_overlaps_with_a_source_is_refused(verb, place, mine, monkeypatch, capsys):
    """Also where the output is of the same verb: its own results would be read, or removed with it."""
    source = mine / "photographs"
    out = (source / place).resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / outputs.MARKER_FILE).write_text(json.dumps({"kind": WRITES[verb][1]}))
    before = content(mine)
    line = refused(verb, out, source, monkeypatch, capsys)
    assert str(out) in line and ("source" in line), line
    assert content(mine) == before


@each_with_a_source
def test_a_link_to_the_source_is_the_source(verb, mine, tmp_path, monkeypatch, capsys):
    (tmp_path / "link").symlink_to(mine / "photographs")
    line = refused(verb, tmp_path / "link" / "out", mine / "photographs", monkeypatch, capsys)
    assert "is in the source" in line


def test_a_forgotten_out_after_two_sources_keeps_the_second(mine, tmp_path, monkeypatch, capsys):
    """`scalp grade BUNDLE 2023 2024`: the second is taken for OUT."""
    before = content(mine)
    line = refused("grade", mine / "photographs", tmp_path / "2023", monkeypatch, capsys)
    assert "it holds 1.jpg" in line and f"if {mine / 'photographs'} is a source, name OUT with --out" in line
    assert content(mine) == before


@pytest.mark.medium
def test_a_set_is_drawn_by_one_run_at_a_time_and_on_a_disk(tmp_path):
    options = SynthOptions(images=3, devices=1)
    with (
        outputs.open_output(str(tmp_path / "set"), "synth"),
        pytest.raises(UserError, match="in use by scalp synth"),
    ):
        synth(str(tmp_path / "set"), options)
    made = synth(str(tmp_path / "set"), options)
    assert made["images"] == 3
    assert synth(str(tmp_path / "set"), options) == made
    with pytest.raises(UserError, match="s3://clinic/set is not a local folder"):
        synth("s3://clinic/set", options)

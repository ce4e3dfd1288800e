"""`scalp results`: queries of a run, printed on a terminal or written to a file."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from jobs.cli.main import app
from jobs.grade.results import parse_path_prefix, results
from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.results.query import Selection
from scalp_core.results.schema import SCHEMA
from scalp_core.storage import parquet
from scalp_core.storage.outputs import SCRATCH_FOLDER
from tests.support.result_rows import failed, referred, row, write

A = "0013_A2LEBJJDE00060O_1602578303771_3_TH.jpg"


def rows(place):
    return [
        row(f"{place}/north/{A}", grade=0, sure=0.9),
        referred(f"{place}/north/b.jpg", "ambiguous_grade", "low_confidence", grade=2, sure=0.4),
        row(f"{place}/2024.zip", f"중등도/{A}", grade=3, sure=0.6),
        row(f"{place}/2024.zip", "=HYPERLINK(A1).jpg", grade=3),
        failed(f"{place}/south/y.jpg", "empty"),
        failed(f"{place}/2024.zip", "truncated", member="중등도/b.jpg"),
    ]


def finished(out, place):
    write(storage.join(out, "results"), rows(place))
    storage.write(storage.join(out, "summary.json"), b"{}")
    return out


@pytest.fixture
def out(tmp_path):
    return finished(str(tmp_path / "out"), str(tmp_path / "clinic"))


@pytest.fixture
def ask(out, monkeypatch):
    """The verb as it is typed, its output in a pipe; a refusal comes as an exception."""
    monkeypatch.setattr("jobs.grade.results.console.width", 200)

    def asked(*options, of=out):
        found = CliRunner().invoke(app, ["results", of, *map(str, options)], catch_exceptions=False)
        assert found.exit_code == 0, found.output
        return found.output

    return asked


def cells(output):
    """The table's lines, each as its cells."""
    lines = [line.replace("┃", "│") for line in output.splitlines()]
    return [[cell.strip() for cell in line[1:-1].split("│")] for line in lines if line.startswith("│")]


def test_without_a_question_an_overview(ask):
    assert dict(cells(ask())) == {
        "rows": "6",
        "graded": "4",
        "by grade": "0 good 1, 2 moderate 1, 3 severe 2",
        "mean severity": "1.600",
        "referred": "1",
        "by reason": "ambiguous_grade 1, low_confidence 1",
        "failed": "2",
        "by error": "empty 1, truncated 1",
    }


@pytest.mark.parametrize(
    ("by", "lines"),
    [
        ("grade", [["0 good", "1"], ["2 moderate", "1"], ["3 severe", "2"], ["", "2"]]),
        ("folder", [["PLACE/north", "2"], ["PLACE/2024.zip!중등도", "2"], ["PLACE/2024.zip", "1"],
                    ["PLACE/south", "1"]]),
        ("archive", [["PLACE/2024.zip", "3"], ["", "3"]]),
        ("device", [["A2LEBJJDE00060O", "2"], ["", "4"]]),
        ("error", [["empty", "1"], ["truncated", "1"], ["", "4"]]),
        ("reason", [["ambiguous_grade", "1"], ["low_confidence", "1"]]),
        ("day", [["2020-10-13", "2"], ["", "4"]]),
    ],
)  # fmt: skip
def test_tables_by_something(ask, tmp_path, by, lines):
    heading, *found = cells(ask("--by", by))
    assert heading == [by, "photographs", "graded", "failed", "referred", "mean severity"]
    expected = [[value.replace("PLACE", str(tmp_path / "clinic")), count] for value, count in lines]
    assert sorted(line[:2] for line in found) == sorted(expected)


def test_rows_of_a_selection(ask, tmp_path):
    place = tmp_path / "clinic"
    assert cells(ask("--status", "referred")) == [
        ["location", "grade", "probability", "severity", "why"],
        [f"{place}/north/b.jpg", "2 moderate", "0.400", "1.600", "ambiguous_grade, low_confidence"],
    ]
    (_, one) = cells(ask("--status", "failed", "--path-prefix", f"{place}/south"))
    assert one == [f"{place}/south/y.jpg", "failed", "", "", "empty: it is broken"]
    assert len(cells(ask("--grade", 3))) == 1 + 2
    assert cells(ask("--by", "grade", "--status", "failed"))[1:] == [["", "2", "0", "2", "0", ""]]


def test_a_place_may_be_given_as_it_is_typed(ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for under, count in [
        ("clinic/north", 2), ("clinic/2024.zip", 3), ("clinic/2024.zip!중등도/", 2), ("./clinic/", 6),
        (f"clinic/north/{A}", 1),
    ]:  # fmt: skip
        assert len(cells(ask("--path-prefix", under))) == 1 + count, under
    with pytest.raises(
        UserError, match="has no row with --path-prefix .*/clinic/nor; scalp results .* shows what"
    ):
        ask("--path-prefix", "clinic/nor")


def test_a_limit_says_that_there_is_more(ask):
    output = ask("--status", "graded", "--limit", 2)
    assert len(cells(output)) == 1 + 2
    assert "and more; --limit N shows N lines, --output FILE.csv|.jsonl|.parquet writes all" in output
    assert "and more" not in ask("--status", "graded", "--limit", 4)
    assert len(cells(ask("--limit", 3))) == 1 + 3  # rows, not the overview


def test_a_select_of_ones_own(ask, tmp_path):
    query = (
        "select grade_name, count(*) as n, avg(grade) as m from results where grade > 1 group by 1 order by 1"
    )
    assert cells(ask("--sql", query)) == [
        ["grade name", "n", "m"], ["moderate", "1", "2.000"], ["severe", "2", "3.000"],
    ]  # fmt: skip
    assert "1 rows are in" in ask("--sql", query, "--limit", 1, "--output", tmp_path / "x.csv")


@pytest.mark.parametrize(
    "query",
    [
        "select * from read_text('/etc/hostname')",
        "copy results to 'stolen.csv'",
        "drop view results",
        "selec",
    ],
)
def test_a_select_reaches_the_rows_and_nothing_else(ask, tmp_path, monkeypatch, query):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="^--sql"):
        ask("--sql", query, "--output", "x.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("query", ["selct", "select nothing from results", "drop view results"])
def test_a_select_that_cannot_run_has_an_example(ask, query):
    with pytest.raises(
        UserError, match="; write one select of the columns in docs/formats.md, for example: "
    ):
        ask("--sql", query)


def test_a_file_of_each_kind_holds_the_chosen_rows(ask, tmp_path):
    written = {kind: tmp_path / "new" / f"rows.{kind}" for kind in ("parquet", "jsonl", "csv")}
    for path in written.values():
        assert f"4 rows are in {path}" in ask("--status", "graded", "--output", path)
    table = pq.read_table(written["parquet"])
    assert table.schema == SCHEMA
    kept = [each for each in rows(str(tmp_path / "clinic")) if each["status"] == "graded"]
    assert table.to_pylist() == pa.Table.from_pylist(kept, schema=SCHEMA).to_pylist()
    lines = [json.loads(line) for line in written["jsonl"].read_text().splitlines()]
    assert [each | {"graded_at": None} for each in lines] == [
        each | {"graded_at": None} for each in table.to_pylist()
    ]
    assert lines[0]["graded_at"] == "2026-11-25T12:00:00+00:00"
    with written["csv"].open(newline="") as file:
        flat = list(csv.DictReader(file))
    assert list(flat[0]) == SCHEMA.names
    assert [each["location_id"] for each in flat] == [each["location_id"] for each in kept]
    assert (flat[1]["refer_reasons"], flat[1]["grade_set"]) == ("ambiguous_grade;low_confidence", "2")
    assert [float(each) for each in flat[1]["probabilities"].split(";")] == kept[1]["probabilities"]
    assert not [path for path in (tmp_path / "new").iterdir() if path not in written.values()]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_file_that_exists_is_kept_unless_it_may_be_overwritten(ask, tmp_path, kind):
    labels = tmp_path / f"labels.{kind}"
    labels.write_bytes(b"a week of work")
    with pytest.raises(UserError, match=f"--output {labels}: the file exists; .* add --overwrite"):
        ask("--status", "graded", "--output", labels)
    assert labels.read_bytes() == b"a week of work"
    assert "4 rows are in" in ask("--status", "graded", "--output", labels, "--overwrite")
    assert labels.read_bytes() != b"a week of work"


@pytest.mark.medium
@pytest.mark.parametrize("name", ["=1+1.jpg", "+1.jpg", "-1.jpg", "@a.jpg", "\ta.jpg", "＝1.jpg"])
def test_a_spreadsheet_finds_no_formula_in_a_name(tmp_path, name):
    write(str(tmp_path / "out" / "results"), [row("/a.zip", name), row("/a.zip", "a=1.jpg")], files=1)
    to = tmp_path / "x.csv"
    sql = "select member, [member, 'b'] as l, -1 as n from results"
    results(str(tmp_path / "out"), sql=sql, to=str(to))
    with to.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert found[0] == {"member": f"'{name}", "l": f"'{name};b", "n": "-1"}
    assert found[1] == {"member": "a=1.jpg", "l": "a=1.jpg;b", "n": "-1"}
    to = tmp_path / "x.jsonl"  # programs get names as they are
    results(str(tmp_path / "out"), Selection(path_prefix=f"/a.zip!{name}"), to=str(to))
    assert json.loads(to.read_text())["member"] == name


def test_a_terminal_obeys_no_name(ask, tmp_path):
    out = str(tmp_path / "odd")
    write(f"{out}/results", [row("/a/\x1b[2J[bold]b\n.jpg"), failed("/a/c.jpg", "empty", "\x1b]0;owned\x07")])
    assert [line[0] for line in cells(ask("--path-prefix", "/a", of=out))[1:]] == [
        "/a/?[2J[bold]b?.jpg", "/a/c.jpg",
    ]  # fmt: skip
    assert "\x1b" not in ask("--status", "failed", of=out)


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("where", ["local", "s3"])
def test_an_export_that_breaks_off_leaves_the_file_before_and_no_other(s3, tmp_path, kind, where):
    place = str(tmp_path) if where == "local" else f"s3://scalp/{tmp_path.name}"
    out = finished(f"{place}/out", "s3://clinic")
    # The second file turns out to be damaged when the first is written already.
    pq.write_table(pa.Table.from_pylist(rows("s3://clinic") * 10_000, SCHEMA), tmp_path / "part.parquet")
    storage.write(f"{out}/results/part-00000.parquet", (tmp_path / "part.parquet").read_bytes())
    whole = storage.read(f"{out}/results/part-00001.parquet")
    storage.write(f"{out}/results/part-00001.parquet", whole[:40] + bytes(400) + whole[440:])
    to = f"{place}/export/rows.{kind}"
    with pytest.raises(UserError, match="cannot read .*results"):
        results(out, to=to)
    assert not storage.names_in(f"{place}/export")
    storage.write(to, b"of yesterday")
    with pytest.raises(UserError, match="cannot read .*results"):
        results(out, to=to, overwrite=True)
    assert storage.names_in(f"{place}/export") == {f"rows.{kind}"}
    assert storage.read(to) == b"of yesterday"


@pytest.mark.medium
def test_rows_and_export_in_s3(s3, ask, tmp_path):
    out = finished(f"s3://scalp/{tmp_path.name}/out", "s3://clinic/a")
    assert len(cells(ask("--path-prefix", "s3://clinic/a/north/", of=out))) == 1 + 2
    assert len(cells(ask("--path-prefix", "s3://clinic/a/2024.zip!중등도", of=out))) == 1 + 2
    to = f"s3://scalp/{tmp_path.name}/export/failed.parquet"
    ask("--status", "failed", "--output", to, of=out)
    assert parquet.read(to)["error_code"].to_pylist() == ["empty", "truncated"]
    assert storage.names_in(f"s3://scalp/{tmp_path.name}/export") == {"failed.parquet"}


def test_an_unfinished_run_prints_a_note(ask, tmp_path):
    out = str(tmp_path / "begun")
    write(storage.join(out, SCRATCH_FOLDER, "graded", "0000-000000"), rows("/clinic")[:2])
    output = ask(of=out)
    assert (
        f"{out} is not finished: these are its rows so far; the same scalp grade command resumes it" in output
    )
    assert dict(cells(output))["rows"] == "2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sql", "select 1", "--status", "failed"], "--sql selects the rows itself; omit --by"),
        (["--output", "rows.xlsx"], "rows.xlsx has an unknown ending; name a file that ends in .csv"),
        (["--output", "OUT/results/more.parquet"], "is in a folder of the run's own files; choose"),
        (["--status", "failed", "--grade", "3"], "has no row with --status failed, --grade 3; scalp results"),
        (["--sql", "select map {'a': 1} as s", "--output", "PLACE/x.csv"],
         "a .csv cannot hold these columns .*; use .jsonl or .parquet"),
    ],
)  # fmt: skip
def test_an_invalid_query_is_refused_with_its_fix(ask, out, tmp_path, options, message):
    options = [each.replace("OUT", out).replace("PLACE", str(tmp_path)) for each in options]
    with pytest.raises(UserError, match=message) as refusal:
        ask(*options)
    assert "\n" not in str(refusal.value)
    assert not [*tmp_path.glob("*.csv"), *tmp_path.glob(".*")]


def test_a_folder_that_grade_did_not_make_is_refused(tmp_path):
    with pytest.raises(UserError, match="create it with: scalp grade BUNDLE SOURCE"):
        results(str(tmp_path))


def test_places_are_as_rows_name_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_path_prefix("a.zip!중등도/") == f"{tmp_path}/a.zip!중등도"
    assert parse_path_prefix("s3://clinic/a/") == "s3://clinic/a"

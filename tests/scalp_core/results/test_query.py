"""SQL queries of result rows: correct answers, and no access beyond the rows."""

import json

import pytest

from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.grades import GRADE_NAMES
from scalp_core.results.query import ALL, ResultRows, Selection
from scalp_core.results.schema import SCHEMA
from scalp_core.storage.outputs import SCRATCH_FOLDER
from tests.support.result_rows import failed, referred, row, write

A, B = "0013_A2LEBJJDE00060O_1602578303771_3_TH.jpg", "0021_A2LEBJJDE00114Q_1606121000000_1_LH.JPG"
ZIP = "/data/clinic/2024.zip"
ROWS = [
    row(f"/data/clinic/north/{A}", grade=0, sure=0.9),
    referred(f"/data/clinic/north/sub/{B}", "ambiguous_grade", "low_confidence", grade=2, sure=0.4),
    referred("/data/clinic/south/x.jpg", "unlike_training", unlikeness=3.0),
    row(ZIP, f"중등도/{A}", grade=3, sure=0.6),
    row(ZIP, "wow!.jpg", grade=3),
    failed(ZIP, "truncated", member="중등도/b.jpg"),
    failed("/data/clinic/loose.jpg", "empty"),
    failed("/data/clinic/south/y.jpg", "empty"),
]


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    write(str(out / "results"), ROWS, files=3)
    (out / "summary.json").write_text("{}")
    with ResultRows(str(out)) as found:
        yield found


def by(graded, *arguments):
    rows = graded.totals_by(*arguments).read_all().to_pylist()
    return {
        each[arguments[0]]: tuple(each[name] for name in ("photographs", "graded", "failed", "referred"))
        for each in rows
    }


def test_totals_of_all_and_of_a_selection(graded):
    found = graded.totals()
    assert found.pop("mean_severity") == pytest.approx(
        sum(each["expected_severity"] for each in ROWS if each["status"] == "graded") / 5
    )
    assert found == {"photographs": 8, "graded": 5, "failed": 3, "referred": 2}
    assert graded.totals(Selection(status="referred"))["photographs"] == 2
    assert graded.totals(Selection(status="failed", path_prefix=ZIP))["photographs"] == 1
    assert graded.totals(Selection(grade=3))["photographs"] == 2
    assert graded.totals(Selection(path_prefix=f"{ZIP}!중등도/"))["photographs"] == 2
    assert graded.totals(Selection(path_prefix=ZIP))["photographs"] == 3
    assert graded.totals(Selection(path_prefix="/data/clinic/sou"))["photographs"] == 0
    assert graded.totals(Selection(path_prefix=ROWS[2]["uri"]))["photographs"] == 1


def test_tables(graded):
    assert by(graded, "grade") == {
        "0 good": (1, 1, 0, 0),
        "1 mild": (1, 1, 0, 1),
        "2 moderate": (1, 1, 0, 1),
        "3 severe": (2, 2, 0, 0),
        None: (3, 0, 3, 0),
    }
    assert by(graded, "folder") == {
        "/data/clinic": (1, 0, 1, 0),
        "/data/clinic/north": (1, 1, 0, 0),
        "/data/clinic/north/sub": (1, 1, 0, 1),
        "/data/clinic/south": (2, 1, 1, 1),
        ZIP: (1, 1, 0, 0),
        f"{ZIP}!중등도": (2, 1, 1, 0),
    }
    assert by(graded, "archive") == {ZIP: (3, 2, 1, 0), None: (5, 3, 2, 2)}
    assert by(graded, "device") == {
        "A2LEBJJDE00060O": (2, 2, 0, 0),
        "A2LEBJJDE00114Q": (1, 1, 0, 1),
        None: (5, 2, 3, 1),
    }
    assert {str(day): found[0] for day, found in by(graded, "day").items()} == {
        "2020-10-13": 2,
        "2020-11-23": 1,
        "None": 5,
    }
    assert by(graded, "error", Selection(status="failed")) == {
        "empty": (2, 0, 2, 0),
        "truncated": (1, 0, 1, 0),
    }
    assert by(graded, "reason") == dict.fromkeys(
        ("ambiguous_grade", "low_confidence", "unlike_training"), (1, 1, 0, 1)
    )


def test_slices_begin_below_the_folder_that_all_share(graded):
    found = graded.slices("top", GRADE_NAMES, 50)
    assert (found["prefix"], found["values"]) == ("/data/clinic/", 4)
    assert {each["value"]: each["photographs"] for each in found["rows"]} == {
        "north": 2,
        "south": 2,
        "2024.zip": 3,
        None: 1,
    }
    (zipped,) = [each for each in found["rows"] if each["value"] == "2024.zip"]
    assert zipped["by_grade"] == [0, 0, 0, 2]
    few = graded.slices("device", GRADE_NAMES, 1)
    assert (len(few["rows"]), few["values"]) == (1, 3)


def test_review_queue_is_sorted(graded):
    assert [each["uri"] for each in graded.least_sure(5)] == [ROWS[1]["uri"], ROWS[2]["uri"]]
    assert [each["uri"] for each in graded.most_unlike(5)] == [ROWS[2]["uri"]]
    failures = graded.failures(1)
    assert [(each["code"], each["photographs"], len(each["examples"])) for each in failures] == [
        ("empty", 2, 1),
        ("truncated", 1, 1),
    ]


def test_rows_are_selected_in_file_order(graded):
    assert graded.select_rows(ALL).schema == SCHEMA
    assert [each["location_id"] for each in graded.select_rows(ALL).read_all().to_pylist()] == [
        each["location_id"] for each in ROWS
    ]


@pytest.mark.parametrize(
    "query",
    [
        "select * from read_csv('/etc/passwd')",
        "select * from '/etc/passwd'",
        "select * from read_text('/etc/passwd')",
        "copy results to '/tmp/x.csv'",
        "set memory_limit = '100GB'",
        "drop view results",
        "select 1; select 2",
        "",
        "selec",
        "select nothing from results",
        "select 1/0 as x, error('no') from results",
    ],
)
def test_query_cannot_access_other_files(graded, query):
    with pytest.raises(UserError, match="^--sql") as refusal:
        graded.run_select(query).read_all()
    assert "\n" not in str(refusal.value)
    assert graded.totals()["photographs"] == 8


def test_a_query_is_answered(graded):
    asked = graded.run_select(
        "select device, count(*) as n from results where device is not null group by 1 order by 1"
    )
    assert [tuple(each.values()) for each in asked.read_all().to_pylist()] == [
        ("A2LEBJJDE00060O", 2),
        ("A2LEBJJDE00114Q", 1),
    ]


def test_unfinished_run_is_read_from_its_work_folder(tmp_path):
    out = str(tmp_path)
    with pytest.raises(UserError, match=f"scalp grade BUNDLE SOURCE {out}"):
        ResultRows(out)
    (tmp_path / "run.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="has no rows yet; run the same scalp grade command"):
        ResultRows(out)
    write(storage.join(out, SCRATCH_FOLDER, "graded", "0000-000000"), ROWS[:5])
    write(storage.join(out, SCRATCH_FOLDER, "graded", "0000-000001"), ROWS[5:])
    write(f"{out}/results", ROWS[:2], files=1)  # was stopped while it wrote them
    with ResultRows(out) as found:
        assert not found.finished
        assert found.totals()["photographs"] == 8


def test_a_damaged_file_is_named(tmp_path):
    write(str(tmp_path / "results"), ROWS)
    (tmp_path / "results" / "part-00001.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(UserError, match="cannot read .*results"), ResultRows(str(tmp_path)) as found:
        found.totals()


def test_rows_in_s3(s3, tmp_path):
    out = f"s3://scalp/{tmp_path.name}/out"
    write(f"{out}/results", [row(f"s3://clinic/a/{A}"), failed("s3://clinic/b/c.jpg", "corrupt")])
    storage.write(f"{out}/summary.json", b"{}")
    with ResultRows(out) as found:
        assert found.finished
        assert found.totals()["failed"] == 1
        assert set(by(found, "folder")) == {"s3://clinic/a", "s3://clinic/b"}

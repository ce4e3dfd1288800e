"""Bulk grading of files of every odd kind, in a folder and in archives: each a row with its reason."""

from jobs.grade.driver import GradeOptions
from jobs.grade.planning import PoolOptions
from scalp_core.results.schema import RESULTS_FOLDER
from tests.support.images import jpeg
from tests.support.odd_files import GRADED, corpus
from tests.support.result_rows import read_results
from tests.with_ray.test_grade import grade_alone, tarred, zipped


def test_every_odd_file_is_one_row_with_its_reason_wherever_it_lies(bundle, tmp_path):
    # Those of 49 megapixels take seconds each; tests/scalp_core/images/test_odd_files.py decodes them.
    odd = {name: each for name, each in corpus().items() if not name.endswith("_7000x7000")}
    files = {f"{name}.jpg": data for name, (data, _) in odd.items()}
    good = {f"good {index}.jpg": jpeg(index) for index in range(len(odd))}
    source = tmp_path / "source"
    source.mkdir()
    for name, data in files.items():
        (source / name).write_bytes(data)
    (source / "all.zip").write_bytes(zipped(files | good))
    (source / "all.tar.gz").write_bytes(tarred(files))
    options = GradeOptions(pool=PoolOptions(shard_size=64), heatmaps=0, max_failed_share=1)
    summary = grade_alone(str(bundle), str(source), str(tmp_path / "out"), options)
    assert (summary["rows"], summary["rows_unaccounted"]) == (3 * len(odd) + len(good), 0)
    outcomes = {}
    for row in read_results(str(tmp_path / "out" / RESULTS_FOLDER)).to_pylist():
        name = (row["member"] or row["uri"]).rsplit("/", 1)[-1].removesuffix(".jpg")
        outcomes.setdefault(name, []).append(row["error_code"] or GRADED)
        assert bool(row["error"]) == (row["status"] == "failed")
    for name, (_, allowed) in odd.items():
        assert len(outcomes[name]) == 3
        # The same bytes have the same answer in a folder, a zip and a tar.
        assert len(set(outcomes[name])) == 1, name
        assert outcomes[name][0] in allowed, name
    assert all(outcomes[name.removesuffix(".jpg")] == [GRADED] for name in good)

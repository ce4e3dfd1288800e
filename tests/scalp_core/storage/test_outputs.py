"""Output directories: files that scalp did not make are kept, and one run at a time writes."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.storage import lease, outputs

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(params=["local", "s3"])
def out(request, tmp_path, s3):
    """An output directory that is not there yet."""
    return str(tmp_path / "out") if request.param == "local" else f"s3://scalp/outputs/{tmp_path.name}"


def test_a_new_directory_is_claimed_by_one_verb(out):
    outputs.claim_output(out, "grade")
    outputs.claim_output(out, "grade")
    with pytest.raises(UserError, match="holds results of scalp grade, not prepare"):
        outputs.claim_output(out, "prepare")
    assert outputs.kind_of(out) == "grade"


@pytest.mark.parametrize("name", ["a.jpg", "work/thesis.tex", "summary.json"])
def test_a_directory_with_files_of_the_user_is_refused_and_kept(out, name):
    storage.write(storage.join(out, name), b"the user's")
    with pytest.raises(UserError, match=f"is not empty.*{name.split('/')[0]}.*was not made by scalp grade"):
        outputs.claim_output(out, "grade")
    assert storage.list_files(out) == [storage.join(out, name)]


@pytest.mark.parametrize("other", ["grade", "train"])
def test_of_runs_that_claim_a_directory_at_once_only_another_verb_is_refused(tmp_path, monkeypatch, other):
    out, is_empty = str(tmp_path / "out"), storage.is_empty

    def is_empty_after_other(folder):
        monkeypatch.setattr(storage, "is_empty", is_empty)
        outputs.claim_output(out, other)
        return is_empty(folder)

    monkeypatch.setattr(storage, "is_empty", is_empty_after_other)
    if other == "train":
        with pytest.raises(UserError, match="holds results of scalp train, not grade"):
            outputs.claim_output(out, "grade")
    else:
        outputs.claim_output(out, "grade")
    assert outputs.kind_of(out) == other


def test_a_folder_that_a_console_made_in_s3_is_empty(s3, tmp_path):
    from scalp_core.storage import s3 as client

    client.put("scalp", f"outputs/{tmp_path.name}/", b"")
    outputs.claim_output(f"s3://scalp/outputs/{tmp_path.name}", "grade")


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "out").write_bytes(b"x")
    with pytest.raises(UserError, match="is a file"):
        outputs.claim_output(str(tmp_path / "out"), "grade")


@pytest.mark.parametrize(
    ("inputs", "out"),
    [
        (["/data/work"], "/data"),
        (["/data"], "/data/out"),
        (["/data"], "/data"),
        (["/data/"], "/data"),
        (["/other", "/data/a/b"], "/data"),
        (["s3://clinic/work"], "s3://clinic"),
        (["s3://clinic/2024"], "s3://clinic/2024/graded"),
        (["/data"], "/"),
        (["/data"], "/x/../data/out"),
    ],
)
def test_a_source_and_an_output_that_overlap_are_refused(inputs, out):
    with pytest.raises(UserError, match="OUT"):
        outputs.check_places(inputs, out)


@pytest.mark.parametrize(("inputs", "out"), [(["/data"], "/data2"), (["s3://a/b"], "s3://a/bc"), ([], "/d")])
def test_places_beside_each_other_are_accepted(inputs, out):
    outputs.check_places(inputs, out)


def test_a_link_into_the_source_is_followed(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "source")
    with pytest.raises(UserError, match="in the source"):
        outputs.check_places([str(tmp_path / "source")], str(tmp_path / "link" / "out"))


def test_only_a_scratch_folder_with_the_marker_is_removed(out):
    folder = outputs.scratch(out)
    storage.write(storage.join(folder, "deep", "a.json"), b"{}")
    outputs.remove_scratch(out)
    assert not outputs.has_scratch(out)
    foreign = storage.join(out, outputs.SCRATCH_FOLDER, "thesis.tex")
    storage.write(foreign, b"the user's")
    outputs.remove_scratch(out)
    with pytest.raises(UserError, match="was not made by scalp"):
        outputs.scratch(out)
    assert storage.read(foreign) == b"the user's"


def test_links_in_a_scratch_folder_are_removed_and_not_followed(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"image")
    folder = Path(outputs.scratch(str(tmp_path / "out")))
    (folder / "link").symlink_to(tmp_path / "images")
    outputs.remove_scratch(str(tmp_path / "out"))
    assert not folder.exists()
    assert (tmp_path / "images" / "a.jpg").read_bytes() == b"image"


def test_leftover_temporary_files_are_no_contents_and_are_removed(tmp_path):
    leftover = tmp_path / f".part.parquet.{'0' * 32}.scalp-tmp"
    leftover.write_bytes(b"half")
    assert storage.is_empty(str(tmp_path))
    assert storage.names_in(str(tmp_path)) == set()
    with outputs.open_output(str(tmp_path), "grade"):
        assert not leftover.exists()


def test_a_second_run_is_refused_in_one_line_and_the_next_one_is_not(out):
    with outputs.open_output(out, "grade"):
        with (
            pytest.raises(UserError, match=r"is in use by scalp grade on .* \(process \d+") as refused,
            outputs.open_output(out, "grade"),
        ):
            pass
        assert "\n" not in str(refused.value)
    with outputs.open_output(out, "grade") as again:
        assert again.guard.epoch == 2


def _hold(out: str, environment: dict[str, str], ready) -> None:
    os.environ.update(environment)
    lease.BEAT_S = 0.2
    with outputs.open_output(out, "grade"):
        ready.set()
        signal.pause()


@pytest.fixture
def holder(out, s3):
    """Another process that holds the lease."""
    ready = SPAWN.Event()
    process = SPAWN.Process(target=_hold, args=(out, s3.environment, ready), daemon=True)
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


def test_the_lease_of_a_killed_run_is_taken_over_and_the_killed_one_would_notice(out, holder):
    with pytest.raises(UserError, match="in use"), outputs.open_output(out, "grade"):
        pass
    first = lease.Guard(out, 1)
    first.check()
    holder.kill()
    holder.join()
    with outputs.open_output(out, "grade") as output:
        assert output.guard.epoch == 2
        output.check()
        with pytest.raises(UserError, match="was taken over by another run"):
            first.check()


@pytest.mark.medium
def test_a_run_on_another_machine_is_dead_once_its_heartbeat_stands_still(out, holder, monkeypatch):
    monkeypatch.setattr(lease, "_machine", lambda: "another")
    with pytest.raises(UserError, match="in use"), outputs.open_output(out, "grade"):
        pass
    holder.kill()
    holder.join()
    monkeypatch.setattr(lease, "DEAD_S", 1)
    with outputs.open_output(out, "grade") as output:
        assert output.guard.epoch == 2


def test_of_two_that_take_over_at_once_one_wins(out, monkeypatch):
    """The other one created its file between this one's look and its own create."""
    newest, looks = lease._newest, []

    def slow(place):
        looks.append(place)
        if len(looks) == 1:
            assert newest(place) == 0
            storage.create(lease._file(lease.Guard(place, 1)), lease._json(theirs))
            return 0
        return newest(place)

    theirs = {"verb": "grade", "host": "h", "machine": lease._machine(), "pid": os.getpid(),
              "process_started": lease.psutil.Process().create_time(), "started_at": "now", "beat": 0,
              "released": False}  # fmt: skip
    outputs.claim_output(out, "grade")
    monkeypatch.setattr(lease, "_newest", slow)
    with pytest.raises(UserError, match="in use"), lease.hold(out, "grade"):
        pass


@pytest.mark.medium
def test_s3_refusing_to_delete_is_an_error(s3, tmp_path, monkeypatch):
    from scalp_core.storage import s3 as client

    answer = client.answer

    def refusing(operation, **query):
        if operation == "delete_objects":  # S3 answers 200 and lists what it kept
            return {"Errors": [{"Key": "k", "Code": "AccessDenied", "Message": "Access Denied"}]}
        return answer(operation, **query)

    out = f"s3://scalp/outputs/{tmp_path.name}"
    storage.write(storage.join(outputs.scratch(out), "a"), b"")
    monkeypatch.setattr(client, "answer", refusing)
    with pytest.raises(UserError, match="cannot remove.*access denied"):
        outputs.remove_scratch(out)

"""Images that requests ask to keep: who may ask, what the answer says, and the review of the store."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from jobs.common.local_executor import LocalExecutor
from jobs.data.prepare import prepare
from scalp_core.curation.audit import Options
from scalp_core.datasets import manifest
from scalp_core.errors import ImageError
from scalp_core.labels.log import read_labels
from scalp_core.results import store as store_module
from scalp_core.results.store import StoreReader, StoreWriter, remove_images
from serving.auth.keys import new_key
from serving.auth.scopes import Rights
from serving.replicas import ingress as ingress_module
from serving.replicas import keeper
from tests.serving.api import test_review
from tests.serving.replicas.test_ingress import GRADED, Endpoint, refused
from tests.support.bundles import make_bundle
from tests.support.command import run_scalp
from tests.support.images import jpeg
from tests.support.ports import free_port

REFERRED = GRADED._replace(
    grading=GRADED.grading.__class__(
        2, "moderate", [0.1, 0.3, 0.5, 0.1], 1.6, [1, 2], 0.5, True, ["ambiguous_grade"]
    )
)


@pytest.fixture(autouse=True)
def _plain_ray(monkeypatch):
    monkeypatch.setattr(ingress_module, "bound_request_queue", lambda: None)


def endpoint(folder: Path, grader: Any = REFERRED, **settings: Any) -> Endpoint:
    return Endpoint(folder / "audit", grader, **({"store": {"folder": f"{folder}/kept"}} | settings))


def photo(number: int = 0) -> bytes:
    """A photograph with a name in its metadata."""
    exif = Image.Exif()
    exif[0x013B] = "Kim Haneul"
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg(number, (320, 240)))).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def keep(of: Endpoint, data: bytes, path: str = "/v1/grade", **options: Any) -> httpx.Response:
    return of.post(path, files={"file": data}, data={"keep": "true"}, **options)


def stored(folder: Path) -> list[dict[str, Any]]:
    return StoreReader(f"{folder}/kept").read().to_pylist()


def test_an_image_is_kept_if_its_request_asks_and_the_answer_proves_it(tmp_path):
    grades = endpoint(tmp_path)
    answer = keep(grades, photo(), "/v1/grade?heatmap=true").json()
    (row,) = stored(tmp_path)
    assert answer["kept"] == {"image_id": row["image_id"], "reason": None}
    assert answer["heatmap"]["grade"] == 2
    same = ("grade", "probabilities", "grade_set", "refer_reasons", "model_version", "computed_by")
    assert {name: row[name] for name in same} == {name: answer[name] for name in same}
    assert b"Kim Haneul" not in Path(row["uri"]).read_bytes()
    graded, kept = grades.audited
    assert (kept["kept"], kept["sha256"], kept["request_id"]) == (
        row["image_id"],
        answer["sha256"],
        graded["request_id"],
    )
    raw = grades.post("/v1/grade?keep=true", content=photo(1), headers={"Content-Type": "image/jpeg"})
    assert raw.json()["kept"]["image_id"] in {row["image_id"] for row in stored(tmp_path)}


@pytest.mark.promise("README: no image is kept that did not ask")
def test_without_opt_in_nothing_is_written(tmp_path):
    grades = endpoint(tmp_path, store={"folder": f"{tmp_path}/kept", "which": "all"})
    for path, field, options in (
        ("/v1/grade", "file", {}),
        ("/v1/grade", "file", {"data": {"keep": "false"}}),
        ("/v1/grade/batch?keep=true", "file", {"data": {"keep": "true"}}),
    ):
        answer = grades.post(path, files={field: photo()}, **options)
        assert answer.status_code == 200
        assert "kept" not in answer.text
    written = [path.name for path in tmp_path.rglob("*") if path.is_file() and "audit" not in str(path)]
    assert written == ["scalp.json"]


def test_an_endpoint_without_a_store_refuses_before_it_grades(tmp_path):
    grades = endpoint(tmp_path, store=None)
    assert refused(keep(grades, photo())) == (422, "no_store")
    assert grades.grader.calls == []


def test_a_key_needs_the_scope(tmp_path):
    keys, lines = {}, []
    for name, scopes in (("ann", ["grade"]), ("bob", ["grade", "keep"]), ("eve", ["keep"])):
        keys[name], line = new_key(name, Rights.parse(scopes))
        lines.append(line)
    file = tmp_path / "keys"
    file.write_text("\n".join(lines))
    file.chmod(0o600)
    grades = endpoint(tmp_path, keys={"file": str(file)})
    as_ = {name: {"Authorization": f"Bearer {key}"} for name, key in keys.items()}
    for name in ("ann", "eve"):
        assert refused(keep(grades, photo(), headers=as_[name])) == (403, "forbidden")
    assert grades.grader.calls == []
    assert keep(grades, photo(), headers=as_["bob"]).json()["kept"]["reason"] is None
    assert grades.post(files={"file": photo()}, headers=as_["ann"]).status_code == 200


@pytest.mark.parametrize(("which", "reason"), [("referred", "not_referred"), ("all", None)])
def test_the_setting_decides_about_images_without_a_referral(tmp_path, which, reason):
    grades = endpoint(tmp_path, GRADED, store={"folder": f"{tmp_path}/kept", "which": which})
    assert keep(grades, photo()).json()["kept"]["reason"] == reason
    assert len(stored(tmp_path)) == (reason is None)
    assert grades.audited[1].get("not_kept") == reason


def test_failing_storage_does_not_stop_grading(tmp_path):
    (tmp_path / "kept").write_text("a file where the folder should be")
    grades = endpoint(tmp_path)
    answer = keep(grades, photo())
    assert (answer.status_code, answer.json()["grade"]) == (200, 2)
    assert answer.json()["kept"] == {"image_id": None, "reason": "storage_failed"}
    assert grades.audited[1]["not_kept"] == "storage_failed"


def test_an_image_whose_metadata_cannot_be_removed_is_not_kept(tmp_path, monkeypatch):
    def strip(_: bytes) -> tuple[bytes, str]:
        raise ImageError("corrupt", "the JPEG has bytes where a marker should be")

    monkeypatch.setattr(store_module, "strip_metadata", strip)
    assert keep(endpoint(tmp_path), photo()).json()["kept"]["reason"] == "metadata"
    assert stored(tmp_path) == []


def test_storage_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    released = threading.Event()

    def add(*_: object) -> str:
        released.wait(60)
        return "1" * 20

    monkeypatch.setattr(StoreWriter, "add", add)
    monkeypatch.setattr(keeper, "_WAIT_S", 0.01)
    grades = endpoint(tmp_path)
    try:
        assert keep(grades, photo()).json()["kept"]["reason"] == "storage_failed"
        monkeypatch.setattr(keeper, "_MAX_WAITING", 0)
        assert keep(grades, photo()).json()["kept"]["reason"] == "busy"
    finally:
        released.set()


@pytest.mark.medium
def test_readers_answer_the_kept_images_and_data_is_prepared_of_them(tmp_path):
    grades = endpoint(tmp_path)
    StoreWriter(f"{tmp_path}/kept", 1).claim()  # as `scalp serve` does
    review = test_review.Endpoint(tmp_path, f"{tmp_path}/kept")
    assert review.ids("kim") == []
    kept = [keep(grades, photo(number)).json()["kept"]["image_id"] for number in range(12)]
    assert review.ids("kim") == kept, "an opened page has the new images, the oldest first"
    for number, image in enumerate(kept):
        picture = review.as_("kim", f"/images/{image}/picture")
        assert (picture.status_code, b"Kim Haneul" in picture.content) == (200, False)
        saved = review.as_("kim", f"/images/{image}/answer", {"grade": number % 4})
        assert saved.json()["left"] == len(kept) - number - 1
    list(remove_images(f"{tmp_path}/kept", kept[:1]))
    assert review.ids("lee") == kept[1:]
    # The removed image has an answer in the log, and is left out of the data.
    prepare(review.labels, f"{tmp_path}/data", Options(ratio="8:1:1"), executor=LocalExecutor())
    rows = manifest.read_manifest(f"{tmp_path}/data").to_pylist()
    labels = {label.sha256: label.grade for label in read_labels(review.labels)}
    assert {row["image_id"] for row in rows} == set(kept[1:])
    assert all(row["label"] == labels[row["sha256"]] for row in rows)


def test_scalp_serve_refuses_a_folder_with_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    refused = run_scalp("serve", tmp_path / "bundle", "--port", free_port(), "--store", tmp_path)
    assert refused.returncode == 2
    assert "not made by scalp serve" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_store_is_not_reviewed_with_a_model_of_another_symptom(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", symptom="dandruff")
    keys = tmp_path / "keys.txt"
    keys.write_text(new_key("kim", Rights.parse(["review"]))[1])
    keys.chmod(0o600)
    kept = ("--store", tmp_path / "kept", "--review", tmp_path / "kept")
    written = ("--review-labels", tmp_path / "labels", "--keys", keys)
    refused = run_scalp("serve", bundle, "--port", free_port(), *kept, *written)
    assert refused.returncode == 2
    assert "are of dandruff (비듬), and readers grade micro-keratin" in refused.stderr

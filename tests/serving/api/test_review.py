"""Reviews on the endpoint: who may read, who decides, and what is answered before and after a restart."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from jobs.review.model_view import compute_neighbors
from scalp_core import storage
from scalp_core.bundles.loading import load_bundle
from scalp_core.errors import UserError
from scalp_core.labels.log import Answer, read_labels
from scalp_core.review import neighbor_search
from scalp_core.review.neighbors import NeighborFiles
from serving import app
from serving.admission.limits import Load
from serving.api.review import check_readers
from serving.auth.keys import VARIABLE, Keys, KeySettings, new_key
from serving.auth.scopes import Rights
from serving.observability.audit import AuditLog
from serving.observability.audit_writer import AuditSettings
from serving.replicas.handles import DeploymentClient, LocalHandle
from serving.replicas.reviewer import SCALING, Reviewer, read_review
from serving.schemas.review import ReviewSettings
from serving.settings import Settings
from tests.serving.api.test_api import Endpoint as WholeEndpoint
from tests.serving.api.test_api import refused
from tests.support.images import jpeg
from tests.support.reviewing import REVIEW, open_review, write_run, write_store, write_training_images
from tests.support.reviewing import ids as ids_of

IMAGES = 5
SCOPES = {
    "kim": ["review"],
    "lee": ["review"],
    "park": ["adjudicate"],
    "ann": ["grade"],
    "root": ["admin"],
}


class Endpoint(WholeEndpoint):
    """The application with keys and a reviewer in this process."""

    def __init__(self, folder: Path, graded: str, audit: bool = False, **review: Any) -> None:
        self.labels = f"{folder}/labels"
        lines = []
        self.keys: dict[str, str] = {}
        for name, scopes in SCOPES.items():
            self.keys[name], line = new_key(name, Rights.parse(scopes))
            lines.append(line)
        file = folder / "keys"
        file.write_text("\n".join(lines))
        file.chmod(0o600)
        settings = ReviewSettings(graded=graded, labels=self.labels, **review)
        log = AuditLog(AuditSettings(folder=f"{folder}/audit")) if audit else None
        super().__init__(log, keys=KeySettings(file=str(file)), review=settings)
        self.restart()

    def restart(self) -> None:
        """Begin again with the log alone, as after a crash."""
        client = DeploymentClient(
            LocalHandle(Reviewer(self.settings.review), SCALING), Load(self.settings.limits)
        )
        self.model = SimpleNamespace(reviewer=client, settings=self.settings)

    def as_(self, name: str, path: str = "", answer: object = None) -> httpx.Response:
        """Send a request with the key of `name`; posts `answer`, if there is one."""
        headers = {"Authorization": f"Bearer {self.keys[name]}"}
        if answer is None:
            return self.ask("GET", f"{REVIEW}{path}", headers=headers)
        return self.ask("POST", f"{REVIEW}{path}", headers=headers, json=answer)

    def ids(self, name: str) -> list[str]:
        """Ids of the images in a new review, in order."""
        found, image = [], self.as_(name).json()["first"]
        while image:
            found.append(image)
            image = self.as_(name, f"/images/{image}").json()["next"]
        return found


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), IMAGES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_training_images(tmp_path_factory.mktemp("training"), 12)


@pytest.fixture
def endpoint(tmp_path, graded):
    return Endpoint(tmp_path, graded)


def test_the_reader_is_the_owner_of_the_key_and_blind_to_others(endpoint):
    first, second, *_ = endpoint.ids("kim")
    saved = endpoint.as_("kim", f"/images/{first}/answer", {"grade": 2, "comment": "wet"})
    assert saved.json() == {
        "answer": {"grade": 2, "reason": None, "comment": "wet"},
        "left": IMAGES - 1,
        "first_open": second,
    }
    state, image = endpoint.as_("lee").json(), endpoint.as_("lee", f"/images/{first}").json()
    assert (state["reader"], state["left"], state["first_open"]) == ("lee", IMAGES, first)
    assert (image["answer"], image["answers"], image["model"]) == (None, None, None)
    assert "kim" not in f"{state}{image}" and "wet" not in f"{state}{image}"
    # A name in the body does not make another reader.
    answer = endpoint.as_("lee", f"/images/{first}/answer", {"grade": 1, "reader": "kim"})
    assert refused(answer) == (422, "bad_field")
    assert [(label.reader, label.grade) for label in read_labels(endpoint.labels)] == [("kim", 2)]


def test_a_key_with_adjudicate_decides_without_names(endpoint):
    first, second, *_ = endpoint.ids("kim")
    for name, grade in (("kim", 1), ("lee", 2)):
        endpoint.as_(name, f"/images/{first}/answer", {"grade": grade})
        endpoint.as_(name, f"/images/{second}/answer", {"reason": "not_a_scalp"})
    state = endpoint.as_("park").json()
    assert (state["adjudicate"], state["images"], state["first"]) == (True, 1, first)
    shown = endpoint.as_("park", f"/images/{first}")
    assert [answer["grade"] for answer in shown.json()["answers"]] == [1, 2]
    assert "kim" not in shown.text and "lee" not in shown.text
    endpoint.as_("park", f"/images/{first}/answer", {"grade": 2})
    last = read_labels(endpoint.labels)[-1]
    assert (last.reader, last.grade, last.deciding) == ("park", 2, True)
    assert endpoint.as_("kim", f"/images/{first}").json()["answer"]["grade"] == 1


def test_other_keys_are_refused(endpoint):
    assert refused(endpoint.as_("ann")) == (403, "forbidden")
    assert "review or adjudicate" in endpoint.as_("ann").json()["detail"]
    assert refused(endpoint.ask("GET", REVIEW)) == (401, "no_key")
    readers_key = {"Authorization": f"Bearer {endpoint.keys['kim']}"}
    for path in ("/v1/model", "/v1/bulk", "/v1/reviewer"):
        assert refused(endpoint.ask("GET", path, headers=readers_key)) == (403, "forbidden")
    assert endpoint.as_("root").json()["adjudicate"] is False


def test_no_answer_is_lost_and_none_is_asked_again_after_a_restart(endpoint, graded):
    first, second, *rest = endpoint.ids("kim")
    endpoint.as_("kim", f"/images/{first}/answer", {"grade": 0})
    endpoint.restart()
    # A page that was open goes on without a reload.
    saved = endpoint.as_("kim", f"/images/{second}/answer", {"grade": 1})
    assert (saved.status_code, saved.json()["left"]) == (200, len(rest))
    assert refused(endpoint.as_("kim", f"/images/{first}")) == (404, "unknown_image")
    endpoint.restart()
    assert endpoint.ids("kim") == rest
    assert [label.grade for label in read_labels(endpoint.labels)] == [0, 1]
    # Another program writes to the same log.
    open_review(graded, endpoint.labels, "kim").answer(rest[0], Answer(grade=3))
    assert endpoint.ids("kim") == rest[1:]


def test_an_answer_is_corrected_after_the_page_was_opened_again(endpoint):
    first, second, *_ = endpoint.ids("kim")
    endpoint.as_("kim", f"/images/{first}/answer", {"grade": 0})
    assert endpoint.as_("kim").json()["first_open"] == second  # another browser, or a reload
    assert endpoint.as_("kim", f"/images/{second}").json()["previous"] == first
    assert endpoint.as_("kim", f"/images/{first}/answer", {"grade": 1}).status_code == 200
    assert [label.grade for label in read_labels(endpoint.labels)] == [0, 1]


def test_a_review_whose_storage_is_away_at_the_start_opens_later(tmp_path, caplog):
    endpoint = Endpoint(tmp_path, f"{tmp_path}/graded")
    caplog.clear()
    answer = endpoint.as_("kim")
    assert refused(answer) == (503, "storage_unavailable")
    # The operator gets the reason; a reader gets no path.
    assert "has no results" in caplog.text
    assert "log has the reason" in answer.json()["detail"] and str(tmp_path) not in answer.text
    write_run(tmp_path, 3)
    assert len(endpoint.ids("kim")) == 3


def test_an_answer_that_is_not_stored_is_not_said_to_be_saved(endpoint, monkeypatch, caplog):
    def full(*_):
        raise UserError(f"cannot write {endpoint.labels}: the disk is full")

    first = endpoint.ids("kim")[0]
    with monkeypatch.context() as patch:
        patch.setattr(storage, "create", full)
        answer = endpoint.as_("kim", f"/images/{first}/answer", {"grade": 1})
        assert refused(answer) == (503, "storage_unavailable")
        assert "the disk is full" in caplog.text and endpoint.labels not in answer.text
    assert endpoint.as_("kim", f"/images/{first}").json()["answer"] is None


@pytest.mark.parametrize("content", [{}, {"grade": 4}, {"grade": "1"}, {"grade": 1, "reason": "not_a_scalp"}])
def test_other_answers_are_refused(endpoint, content):
    first = endpoint.ids("kim")[0]
    assert refused(endpoint.as_("kim", f"/images/{first}/answer", content)) == (422, "bad_field")
    assert read_labels(endpoint.labels) == []


def test_pictures_have_no_metadata_and_reads_are_audited(tmp_path):
    graded = write_run(tmp_path, 3)
    endpoint = Endpoint(tmp_path, graded, audit=True)
    first = endpoint.ids("kim")[0]
    picture = endpoint.as_("kim", f"/images/{first}/picture")
    assert picture.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(picture.content)).size == (320, 240)
    endpoint.as_("kim", f"/images/{first}/answer", {"grade": 1})
    uri = open_review(graded, endpoint.labels, "lee").location(first).uri
    storage.write(uri, jpeg(99))
    assert refused(endpoint.as_("kim", f"/images/{first}/picture")) == (422, "changed")
    assert refused(endpoint.as_("kim", "/images/none/picture")) == (404, "unknown_image")
    endpoint.audit.close()
    (file,) = Path(tmp_path, "audit").glob("audit-*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    path = f"{REVIEW}/images/{{id}}"
    assert [(line["key"], line["route"], line["status"], line.get("image_id")) for line in lines] == [
        ("kim", f"{path}/picture", 200, first),
        ("kim", f"{path}/answer", 200, first),
        ("kim", f"{path}/picture", 422, None),
        ("kim", f"{path}/picture", 404, None),
    ]


def test_a_picture_that_cannot_be_read_names_no_location(tmp_path, caplog):
    graded = write_run(tmp_path / "grade-3" / "hong-gildong", 4)
    endpoint = Endpoint(tmp_path, graded)
    session = open_review(graded, endpoint.labels, "lee")
    for image in endpoint.ids("kim"):
        uri = session.location(image).uri
        for content in (b"", b"other", None):
            storage.remove_file(uri)
            if content is None:
                Path(uri).mkdir()
            else:
                Path(uri).write_bytes(content)
            caplog.clear()
            answer = endpoint.as_("kim", f"/images/{image}/picture")
            assert answer.status_code in (415, 422), answer.text
            assert "hong-gildong" not in answer.text and ".jpg" not in answer.text, answer.text
            assert uri in caplog.text  # of the operator
            if content is None:
                Path(uri).rmdir()


def test_a_heatmap_is_sent_after_the_reader_asked_and_the_answer_is_marked(tmp_path, bundle):
    graded = write_run(tmp_path, 3, load_bundle(str(bundle)).spec.model_version)
    endpoint = Endpoint(tmp_path, graded, bundle=str(bundle))
    first, second, _ = endpoint.ids("kim")
    assert endpoint.as_("kim").json()["resize"] == "squash"
    assert refused(endpoint.as_("kim", f"/images/{first}/heatmap")) == (409, "not_revealed")
    assert endpoint.as_("kim", f"/images/{first}/reveal", {}).json() == {"saw_model": True}
    png = endpoint.as_("kim", f"/images/{first}/heatmap")
    assert png.headers["content-type"] == "image/png"
    assert np.asarray(Image.open(io.BytesIO(png.content))).shape == (64, 64, 4)
    assert refused(endpoint.as_("lee", f"/images/{first}/heatmap")) == (409, "not_revealed")
    for image in (first, second):
        endpoint.as_("kim", f"/images/{image}/answer", {"grade": 1})
    assert [label.saw_model for label in read_labels(endpoint.labels)] == [True, False]


def test_similar_training_images_that_were_found_before_are_sent_after_the_reader_asked(
    tmp_path, bundle, data
):
    graded = write_run(tmp_path, 3, load_bundle(str(bundle)).spec.model_version)
    review = {"bundle": str(bundle), "neighbors": data}
    with pytest.raises(
        UserError, match=rf"run scalp neighbors {graded} {tmp_path}/labels --bundle {bundle} --data"
    ):
        read_review(ReviewSettings(graded=graded, labels=f"{tmp_path}/labels", **review))
    compute_neighbors(graded, f"{tmp_path}/labels", str(bundle), data)
    endpoint = Endpoint(tmp_path, graded, audit=True, **review)
    first, second, _ = endpoint.ids("kim")
    assert endpoint.as_("kim", f"/images/{first}").json()["has_neighbors"] is True
    assert refused(endpoint.as_("kim", f"/images/{first}/neighbors")) == (409, "not_revealed")
    endpoint.as_("kim", f"/images/{first}/reveal", {})
    alike = endpoint.as_("kim", f"/images/{first}/neighbors").json()["neighbors"]
    assert {neighbor["grade"] for neighbor in alike} == set(range(4))
    assert Image.open(io.BytesIO(base64.b64decode(alike[0]["picture"]))).format == "JPEG"
    assert refused(endpoint.as_("lee", f"/images/{first}/neighbors")) == (409, "not_revealed")
    for image in (first, second):
        endpoint.as_("kim", f"/images/{image}/answer", {"grade": 1})
    assert [label.saw_model for label in read_labels(endpoint.labels)] == [True, False]


def test_the_order_by_looks_takes_features_that_were_computed_before(tmp_path, bundle, data):
    graded = write_run(tmp_path, 6, load_bundle(str(bundle)).spec.model_version)
    review = {"bundle": str(bundle), "order": "diverse"}
    with pytest.raises(UserError, match=r"has no features of .*compute them with scalp neighbors, or set it"):
        read_review(ReviewSettings(graded=graded, labels=f"{tmp_path}/labels", **review))
    compute_neighbors(graded, f"{tmp_path}/labels", str(bundle), data)
    command = open_review(graded, f"{tmp_path}/labels", order="diverse", bundle=str(bundle))
    assert Endpoint(tmp_path, graded, **review).ids("kim") == ids_of(command)


@pytest.mark.medium
def test_the_view_of_kept_images_comes_with_the_page_that_is_opened_next(tmp_path, bundle, data, caplog):
    kept, version = f"{tmp_path}/kept", load_bundle(str(bundle)).spec.model_version
    write_store(kept, [version, "older"])
    endpoint = Endpoint(tmp_path, kept, bundle=str(bundle), neighbors=data)
    assert "run scalp neighbors" in caplog.text

    def offered() -> list[tuple[bool, bool]]:
        shown = [endpoint.as_("kim", f"/images/{image}").json() for image in endpoint.ids("kim")]
        return [(image["has_heatmap"], image["has_neighbors"]) for image in shown]

    assert offered() == [(True, False), (False, False)]
    compute_neighbors(kept, endpoint.labels, str(bundle), data)
    assert offered() == [(True, True), (False, False)]
    _, other = endpoint.ids("kim")
    endpoint.as_("kim", f"/images/{other}/reveal", {})
    for view in ("heatmap", "neighbors"):
        assert refused(endpoint.as_("kim", f"/images/{other}/{view}")) == (409, "not_revealed")


@pytest.mark.medium
def test_a_new_image_of_a_store_is_compared_when_a_reader_asks(tmp_path, bundle, data, caplog, monkeypatch):
    kept, labels = f"{tmp_path}/kept", f"{tmp_path}/labels"
    write_store(kept, [])
    compute_neighbors(kept, labels, str(bundle), data)  # of the training images alone
    endpoint = Endpoint(tmp_path, kept, bundle=str(bundle), neighbors=data)
    assert "run scalp neighbors" not in caplog.text and not endpoint.ids("kim")
    write_store(kept, [load_bundle(str(bundle)).spec.model_version, "older"])
    image, _ = endpoint.ids("kim")

    def offered() -> list[bool]:
        images = (endpoint.as_("kim", f"/images/{name}").json() for name in endpoint.ids("kim"))
        return [shown["has_neighbors"] for shown in images]

    assert offered() == [True, False]
    with monkeypatch.context() as patch:
        patch.setattr(neighbor_search, "MOST_SEARCHED", 3)
        endpoint.restart()
        assert offered() == [False, False]
    endpoint.restart()
    assert offered() == [True, False]
    assert refused(endpoint.as_("kim", f"/images/{image}/neighbors")) == (409, "not_revealed")
    endpoint.as_("kim", f"/images/{image}/reveal", {})
    shown = endpoint.as_("kim", f"/images/{image}/neighbors").json()["neighbors"]
    compute_neighbors(kept, f"{tmp_path}/others", str(bundle), data)
    spec = load_bundle(str(bundle)).spec
    found = [NeighborFiles(spec, data, folder).find(image) for folder in (labels, f"{tmp_path}/others")]
    assert found[0] == found[1] and [neighbor.grade for neighbor in found[0]] == [
        neighbor["grade"] for neighbor in shown
    ]


def test_neighbors_of_another_model_or_without_one_are_refused(tmp_path, bundle, data):
    graded = write_run(tmp_path, 3)
    with pytest.raises(ValueError, match="neighbors needs the model that compared the images; set bundle"):
        ReviewSettings(graded=graded, labels="labels", neighbors=data)
    with pytest.raises(UserError, match="but made graded the images"):
        compute_neighbors(graded, f"{tmp_path}/labels", str(bundle), data)
    assert not storage.exists(f"{tmp_path}/labels")


def test_the_model_is_shown_if_the_operator_wants_it(tmp_path, graded):
    endpoint = Endpoint(tmp_path, graded, show_model=True, order="informative")
    first = endpoint.ids("kim")[0]
    image = endpoint.as_("kim", f"/images/{first}").json()
    assert (image["model"]["grade"], image["saw_model"]) == ((IMAGES - 1) % 4, True)
    endpoint.as_("kim", f"/images/{first}/answer", {"grade": 1})
    assert read_labels(endpoint.labels)[0].saw_model


def test_the_page_needs_no_key_and_an_endpoint_without_a_review_says_so(endpoint):
    page = endpoint.ask("GET", "/review")
    assert page.status_code == 200 and "/page/review.js" in page.text
    assert endpoint.ask("GET", "/page/review.js").status_code == 200
    endpoint.model.reviewer = None
    assert refused(endpoint.as_("kim")) == (404, "review_not_offered")


def test_mistakes_are_reported_before_the_start(tmp_path, graded, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    review = ReviewSettings(graded=graded, labels=f"{tmp_path}/labels")
    with pytest.raises(UserError, match=r"no keys, which name the readers; add --keys FILE"):
        app.start("none", "127.0.0.1", 0, Settings(review=review))
    check_readers(None, Keys(KeySettings()))
    monkeypatch.setenv(VARIABLE, new_key("kim", Rights(review=True))[1])
    for changes, said in (
        ({"graded": f"{tmp_path}/none"}, "has no results"),
        ({"labels": f"{graded}/labels"}, "is in the source"),
    ):
        with pytest.raises(UserError, match=said):
            app.start("none", "127.0.0.1", 0, Settings(review=review.model_copy(update=changes)))
    assert not storage.exists(review.labels)

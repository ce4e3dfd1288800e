"""The model's view of an image: who sees it, what is recorded, and what it shows."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from jobs.review import features, neighbors
from jobs.review.app import create_app
from jobs.review.model_view import compute_neighbors
from scalp_core import storage
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.labels.log import Answer, read_labels
from scalp_core.review import features as stored_features
from scalp_core.review.features import FEATURES_FOLDER
from scalp_core.review.neighbor_search import COUNT
from scalp_core.review.neighbors import MAX_SIDE
from tests.support.images import jpeg
from tests.support.reviewing import ids, open_review, write_run, write_store, write_training_images

IMAGES = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("review")


@pytest.fixture(scope="module")
def graded(root, bundle):
    return write_run(root, IMAGES, load_bundle(str(bundle)).spec.model_version)


@pytest.fixture(scope="module")
def data(root):
    return write_training_images(root, 40)


@pytest.fixture
def labels(tmp_path):
    return str(tmp_path / "labels")


def visit(session):
    client = TestClient(create_app(session, "secret", 8001), base_url="http://127.0.0.1:8001")
    client.get("/?token=secret")
    return client


def reveal(client, image):
    return client.post(f"/v1/review/images/{image}/reveal", json={})


def test_a_heatmap_is_sent_after_the_reader_asked_and_the_answer_is_marked(graded, labels, bundle):
    client = visit(session := open_review(graded, labels, bundle=str(bundle)))
    first, second, *_ = ids(session)
    assert client.get("/v1/review").json()["resize"] == "squash"
    refused = client.get(f"/v1/review/images/{first}/heatmap")
    assert (refused.status_code, refused.json()["code"]) == (409, "not_revealed")
    assert client.get(f"/v1/review/images/{first}").json()["saw_model"] is False
    assert reveal(client, first).json() == {"saw_model": True}
    answer = client.get(f"/v1/review/images/{first}/heatmap")
    assert answer.headers["content-type"] == "image/png"
    heat = np.asarray(Image.open(io.BytesIO(answer.content)))
    assert heat.shape == (64, 64, 4) and heat[..., 3].max() == 255
    assert client.get(f"/v1/review/images/{second}/heatmap").status_code == 409
    client.post(f"/v1/review/images/{first}/answer", json={"grade": 1})
    client.post(f"/v1/review/images/{second}/answer", json={"grade": 1})
    assert [label.saw_model for label in read_labels(labels)] == [True, False]


def test_an_answer_of_a_later_session_is_marked_too(graded, labels, bundle):
    session = open_review(graded, labels, bundle=str(bundle))
    first, second, *_ = ids(session)
    session.answer(first, Answer(grade=0))
    session.reveal(first)
    session.reveal(second)
    later = open_review(graded, labels, answered_too=True)  # also one without the view of the model
    later.answer(first, Answer(grade=1))
    later.answer(second, Answer(grade=1))
    other = open_review(graded, labels, "lee")
    other.answer(second, Answer(grade=1))
    assert [label.saw_model for label in read_labels(labels)] == [False, True, True, False]


def test_a_correction_after_a_review_with_the_model_in_view_is_marked(graded, labels):
    open_review(graded, labels, show_model=True).answer(ids(open_review(graded, labels))[0], Answer(grade=1))
    blind = open_review(graded, labels, answered_too=True)
    blind.answer(ids(blind)[0], Answer(grade=2))
    assert [label.saw_model for label in read_labels(labels)] == [True, True]


def test_the_view_is_not_sent_if_it_cannot_be_recorded(graded, labels, bundle, monkeypatch):
    def full(*_):
        raise UserError("the disk is full; free some")

    client = visit(session := open_review(graded, labels, bundle=str(bundle)))
    first = ids(session)[0]
    with monkeypatch.context() as patch:
        patch.setattr(storage, "create", full)
        assert reveal(client, first).json()["code"] == "not_saved"
    assert client.get(f"/v1/review/images/{first}/heatmap").status_code == 409
    assert client.post(f"/v1/review/images/{first}/reveal", content="x").status_code == 415


def test_similar_training_images_come_with_their_grades(graded, labels, bundle, data):
    client = visit(session := open_review(graded, labels, bundle=str(bundle), neighbors=data))
    rows = manifest.select_split(manifest.read_manifest(data), "train").to_pylist()
    train, twins = {row["uri"] for row in rows}, 0
    for number, image in enumerate(ids(session)):
        assert client.get(f"/v1/review/images/{image}/neighbors").status_code == 409
        reveal(client, image)
        assert client.get(f"/v1/review/images/{image}").json()["has_neighbors"] is True
        alike = client.get(f"/v1/review/images/{image}/neighbors").json()["neighbors"]
        assert len(alike) == COUNT
        places = [Path(neighbor.location.uri) for neighbor in session.neighbors(image)]
        assert [int(place.parent.name) for place in places] == [neighbor["grade"] for neighbor in alike]
        assert train.issuperset(map(str, places))
        twin = places[0].parents[1] / f"{number % 4}/{number:02d}.jpg"  # the same pixels in other bytes
        if str(twin) in train:
            twins += 1
            assert places[0] == twin
        for neighbor in alike:
            picture = Image.open(io.BytesIO(base64.b64decode(neighbor["picture"])))
            assert picture.format == "JPEG" and max(picture.size) <= MAX_SIDE
    assert twins


def test_features_are_computed_once(graded, labels, bundle, data, monkeypatch):
    first = open_review(graded, labels, bundle=str(bundle), neighbors=data)
    image = ids(first)[0]
    first.reveal(image)

    def compute(*_):
        raise AssertionError("computed again")

    for module in (neighbors, features):
        monkeypatch.setattr(module, "iterate_features", compute)
    second = open_review(graded, labels, bundle=str(bundle), neighbors=data)
    assert second.neighbors(image) == first.neighbors(image)


@pytest.mark.medium
def test_pieces_give_the_neighbors_of_one_comparison(graded, labels, bundle, data, tmp_path, monkeypatch):
    whole = open_review(graded, labels, bundle=str(bundle), neighbors=data)
    monkeypatch.setattr(stored_features, "PIECE", 5)
    pieces = open_review(graded, str(tmp_path / "others"), bundle=str(bundle), neighbors=data)
    for image in ids(whole):
        whole.reveal(image)
        pieces.reveal(image)
        assert pieces.neighbors(image) == whole.neighbors(image)


def test_the_order_by_looks_computes_features_once(root, graded, bundle, tmp_path, monkeypatch):
    labels = str(tmp_path / "labels")
    with pytest.raises(UserError, match="does not name its bundle; name it with --bundle"):
        open_review(graded, labels, order="diverse")
    assert not storage.exists(labels)
    first = open_review(graded, labels, order="diverse", bundle=str(bundle))
    assert sorted(ids(first)) == sorted(ids(open_review(graded, labels)))
    monkeypatch.setattr(features, "iterate_features", None)
    run = str(tmp_path / "graded")
    shutil.copytree(graded, run)
    storage.write(f"{run}/run.json", json.dumps({"bundle": str(bundle)}).encode())
    again = open_review(run, labels, "lee", order="diverse")  # by the bundle that the run names
    assert ids(again) == ids(first)
    assert again.describe()["resize"] is None  # which offers no heatmaps
    storage.write(f"{run}/run.json", json.dumps({"bundle": f"{root}/gone"}).encode())
    with pytest.raises(UserError, match="the bundle of the run, .*gone is not a bundle.* or use informative"):
        open_review(run, labels, order="diverse")


def test_images_that_cannot_be_compared_follow_the_least_certain_first(tmp_path, labels, bundle, capsys):
    graded = write_run(tmp_path, 6, load_bundle(str(bundle)).spec.model_version)
    informative = ids(session := open_review(graded, labels, order="informative"))
    lost = [informative[0], informative[2]]
    for number, image in enumerate(lost):
        storage.write(session.location(image).uri, jpeg(90 + number))
    diverse = ids(open_review(graded, labels, order="diverse", bundle=str(bundle)))
    assert diverse[-2:] == lost and sorted(diverse) == sorted(informative)
    assert "2 of 6 images follow, the least certain first" in capsys.readouterr().out


def test_an_image_that_cannot_be_read_has_no_neighbors(tmp_path, labels, bundle, data, capsys):
    graded = write_run(tmp_path, 4, load_bundle(str(bundle)).spec.model_version)
    first = ids(session := open_review(graded, labels))[0]
    storage.write(session.location(first).uri, jpeg(99))
    session = open_review(graded, labels, bundle=str(bundle), neighbors=data)
    assert "1 of 4 images of the queue cannot be read" in capsys.readouterr().out
    session.reveal(first)
    assert session.image(first)["has_neighbors"] is False and session.neighbors(first) is None
    assert visit(session).get(f"/v1/review/images/{first}/heatmap").json()["code"] == "changed"


@pytest.mark.medium
def test_a_training_image_that_was_removed_has_no_picture(tmp_path, graded, bundle):
    data, labels = write_training_images(tmp_path, 12), f"{tmp_path}/labels"
    session = open_review(graded, labels, bundle=str(bundle), neighbors=data)
    image = ids(session)[0]
    session.reveal(image)
    nearest, *others = session.neighbors(image)
    storage.remove_file(nearest.location.uri)
    alike = visit(session).get(f"/v1/review/images/{image}/neighbors").json()["neighbors"]
    assert [neighbor["picture"] is None for neighbor in alike] == [True] + [False] * len(others)


def test_missing_features_are_computed_if_the_neighbors_are_known(graded, labels, bundle, data):
    """An endpoint that searches a new image adds its neighbors alone."""
    compute_neighbors(graded, labels, str(bundle), data)
    storage.remove_folder(f"{labels}/{FEATURES_FOLDER}")
    compute_neighbors(graded, labels, str(bundle), data)
    files = stored_features.FeatureFiles(load_bundle(str(bundle)).spec, labels)
    assert all(image in files for image in ids(open_review(graded, labels)))


def test_similar_images_of_a_store_are_those_of_images_that_the_bundle_graded(tmp_path, bundle, data, capsys):
    version = load_bundle(str(bundle)).spec.model_version
    kept, labels = f"{tmp_path}/kept", f"{tmp_path}/labels"
    write_store(kept, [version, version, "older"])
    compute_neighbors(kept, labels, str(bundle), data)
    assert "graded 1 of 3 images" in capsys.readouterr().out
    session = open_review(kept, labels, bundle=str(bundle), neighbors=data)
    shown = [session.image(image) for image in ids(session)]
    assert [(image["has_heatmap"], image["has_neighbors"]) for image in shown] == [
        (True, True),
        (True, True),
        (False, False),
    ]
    other = shown[-1]["image_id"]
    session.reveal(other)
    assert session.heatmap(other) is None and session.neighbors(other) is None


def test_a_review_without_the_view_offers_none(graded, labels):
    client = visit(session := open_review(graded, labels))
    described = client.get("/v1/review").json()
    assert described["resize"] is None
    image = ids(session)[0]
    shown = client.get(f"/v1/review/images/{image}").json()
    assert (shown["has_heatmap"], shown["has_neighbors"]) == (False, False)
    reveal(client, image)
    for path in ("heatmap", "neighbors"):
        assert client.get(f"/v1/review/images/{image}/{path}").status_code == 409


def test_mistakes_are_reported_before_labels_is_made(root, graded, labels, bundle, data, tmp_path):
    with pytest.raises(UserError, match="add --bundle BUNDLE"):
        open_review(graded, labels, neighbors=data)
    other = write_run(tmp_path, 4)
    with pytest.raises(UserError, match="but made graded the images; give the bundle of the run"):
        open_review(other, labels, bundle=str(bundle))
    with pytest.raises(UserError, match=r"has no data\.json"):
        open_review(graded, labels, bundle=str(bundle), neighbors=f"{root}/training")
    with pytest.raises(UserError, match="is in the source"):
        open_review(graded, f"{data}/labels", bundle=str(bundle), neighbors=data)
    assert not storage.exists(labels)


def test_a_model_with_nothing_to_show_is_refused_before_the_log_is_made(graded, labels, bundle, monkeypatch):
    def fail(*_):
        raise UserError("vit has no convolutional feature map")

    monkeypatch.setattr("scalp_core.review.model_view.make_explainer", fail)
    with pytest.raises(UserError, match="has no convolutional feature map"):
        open_review(graded, labels, bundle=str(bundle))
    assert not Path(labels).exists()

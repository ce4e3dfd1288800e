"""`scalp explain` on real files: a picture for each photograph that can be read, a reason for each other."""

import io
import json
import zipfile
from contextlib import redirect_stdout

import numpy as np
import pytest
from PIL import Image

from jobs.evaluate.explain import explain
from scalp_core import storage
from scalp_core.bundles.loading import load_bundle
from scalp_core.errors import UserError
from scalp_core.images.preprocess import decode
from scalp_core.inference.explainer import make_explainer
from scalp_core.inference.overlay import MEANING, overlay
from scalp_core.inference.predictor import Predictor
from tests.support.images import jpeg

GOOD = {f"{index}/photo {index}.jpg": jpeg(index) for index in range(20)}
BAD = {"4/empty.jpg": b"", "7/text.png": b"hello", "9/cut.jpg": jpeg(1)[:9000]}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    source = tmp_path_factory.mktemp("explain") / "source"
    for name, content in (GOOD | BAD | {"notes.txt": b"no photograph"}).items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return source


@pytest.fixture(scope="module")
def explained(bundle, cluster, source, tmp_path_factory):
    """Output and summary of a run over the whole source, and what it printed."""
    out = tmp_path_factory.mktemp("explained") / "out"
    printed = io.StringIO()
    with redirect_stdout(printed):
        summary = explain(str(bundle), str(source), str(out))
    return out, summary, printed.getvalue()


def test_every_photograph_has_a_picture_or_a_reason(explained, source):
    out, summary, printed = explained
    assert summary == json.loads((out / "summary.json").read_text())
    assert (summary["photographs"], summary["explained"], summary["failed"]) == (23, 20, 3)
    assert summary["by_error"] == {"empty": 1, "not_an_image": 1, "truncated": 1}
    assert summary["meaning"] == MEANING
    assert summary["meaning"] in printed
    reasons = {row["uri"]: row["error_code"] for row in summary["rows"] if row["status"] == "failed"}
    assert reasons == {
        str(source / "4/empty.jpg"): "empty",
        str(source / "7/text.png"): "not_an_image",
        str(source / "9/cut.jpg"): "truncated",
    }
    pictures = {row["picture"] for row in summary["rows"] if row["status"] == "explained"}
    assert {path.name for path in out.glob("*.png")} == pictures
    assert len(pictures) == 20


def test_a_picture_shows_its_own_photograph_and_its_grade(bundle, source, explained):
    out, summary, _ = explained
    loaded = load_bundle(str(bundle))
    predictor, explainer = Predictor(loaded, "cpu"), make_explainer(loaded, "cpu")
    for row in summary["rows"]:
        if row["status"] == "failed":
            continue
        pixels = decode(GOOD[row["uri"].removeprefix(f"{source}/")], loaded.spec.preprocess).pixels
        (answer,) = predictor.grade(pixels[None])
        assert row["grade"] == row["explained_grade"] == answer.grade
        assert row["probabilities"] == pytest.approx(answer.probabilities, abs=1e-5)
        with Image.open(out / row["picture"]) as picture:
            shown = np.asarray(picture)
        side = (shown.shape[1] - 3 * 12) // 2
        expected = overlay(pixels, explainer.heatmap(pixels, answer.grade), opacity=0.6)
        for panel, start in ((pixels, 12), (expected, 24 + side)):
            found = Image.fromarray(shown[12 : 12 + side, start : start + side])
            small = np.asarray(found.resize(pixels.shape[:2], Image.Resampling.BOX)).astype(int)
            assert np.abs(small - panel).mean() < 3


def test_the_grade_that_is_asked_for_is_explained(bundle, source, explained, tmp_path):
    out, own, _ = explained
    asked = explain(str(bundle), str(source), str(tmp_path), grade=3)
    differ = 0
    for one, other in zip(own["rows"], asked["rows"], strict=True):
        if other["status"] == "failed":
            continue
        assert (other["explained_grade"], other["grade"]) == (3, one["grade"])
        pictures = [(folder / one["picture"]).read_bytes() for folder in (out, tmp_path)]
        assert (one["grade"] == 3) == (pictures[0] == pictures[1])
        differ += one["grade"] != 3
    assert differ


def test_a_limit_is_spread_and_a_finished_run_ends_at_once_and_another_is_not_mixed_in(
    bundle, cluster, source, tmp_path, capsys
):
    out = str(tmp_path / "out")
    summary = explain(str(bundle), str(source), out, limit=5)
    assert (summary["photographs"], summary["photographs_in_source"]) == (5, 23)
    names = sorted(str(path) for path in source.rglob("*.*g"))
    places = [names.index(row["uri"]) for row in summary["rows"]]
    assert places[0] < 5
    assert places[-1] > 17

    assert explain(str(bundle), str(source), out, limit=5) == summary
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="grade None, not 1; choose another OUT"):
        explain(str(bundle), str(source), out, grade=1, limit=5)


def test_members_of_a_zip_in_s3_are_explained_to_s3(bundle, cluster, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in ({"a.jpg": GOOD["0/photo 0.jpg"]} | BAD).items():
            archive.writestr(name, content)
    source, out = f"s3://scalp/{tmp_path.name}/photographs.zip", f"s3://scalp/{tmp_path.name}/out"
    storage.write(source, buffer.getvalue())
    summary = explain(str(bundle), source, out)
    assert (summary["explained"], summary["failed"]) == (1, 3)
    (row,) = [row for row in summary["rows"] if row["status"] == "explained"]
    assert row["member"] == "a.jpg"
    assert Image.open(io.BytesIO(storage.read(f"{out}/{row['picture']}"))).format == "PNG"

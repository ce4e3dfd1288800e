"""Records of readers who asked for the model's view."""

from __future__ import annotations

from scalp_core import storage
from scalp_core.labels.log import open_log, read_labels
from scalp_core.labels.views import VIEWS_FOLDER, ModelViews


def test_a_view_is_known_to_later_sessions_of_its_reader_alone(tmp_path):
    labels = str(tmp_path / "labels")
    open_log(labels)
    views = ModelViews(labels, "김")
    other_session = ModelViews(labels, "김")
    views.add("a" * 20)
    assert "a" * 20 in views and "b" * 20 not in views
    other_session.add("a" * 20)  # recorded already, by the first session
    again = ModelViews(labels, "김")
    assert "a" * 20 in again and "b" * 20 not in again
    assert "a" * 20 not in ModelViews(labels, "lee")
    again.add("c" * 20)
    views.refresh("c" * 20)
    views.refresh("d" * 20)
    assert "c" * 20 in views and "d" * 20 not in views
    first, _ = sorted(storage.names_in(f"{labels}/{VIEWS_FOLDER}"))
    assert storage.read_json(f"{labels}/{VIEWS_FOLDER}/{first}")["reader"] == "김"
    assert read_labels(labels) == []

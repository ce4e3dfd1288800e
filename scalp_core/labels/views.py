"""Record which reader asked for the model's view of which image, in files that are only added.

LABELS/views/READER-IMAGE.json      READER: start of the SHA-256 of the reader's name; IMAGE: `image_id`

A reader may ask today and answer tomorrow, so the record outlives the session.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from hashlib import sha256

from scalp_core import storage

VIEWS_FOLDER = "views"

_DIGITS = 16


class ModelViews:
    """The images of which one reader has seen the model's view.

    Args:
        labels: Directory of the label log, local or `s3://`.
        reader: Name of the reader.

    Raises:
        UserError: storage failed.
    """

    def __init__(self, labels: str, reader: str) -> None:
        self._reader = reader
        self._folder = storage.join(labels, VIEWS_FOLDER)
        self._prefix = f"{sha256(reader.encode()).hexdigest()[:_DIGITS]}-"
        self._names = {name for name in storage.names_in(self._folder) if name.startswith(self._prefix)}

    def __contains__(self, image_id: str) -> bool:
        return self._name(image_id) in self._names

    def refresh(self, image_id: str) -> None:
        """Read whether another session of the reader, maybe of another process, has recorded a view.

        Raises:
            UserError: storage failed.
        """
        name = self._name(image_id)
        if name not in self._names and storage.read_json(storage.join(self._folder, name)) is not None:
            self._names.add(name)

    def add(self, image_id: str) -> None:
        """Record a view; the record is on the disk, or in the bucket, when this returns.

        Raises:
            UserError: storage failed.
        """
        if image_id in self:
            return
        time = datetime.now(UTC).isoformat(timespec="seconds")
        view = {"image_id": image_id, "reader": self._reader, "time": time}
        # Another session of the reader may have recorded it: the first record stays.
        storage.create(storage.join(self._folder, self._name(image_id)), json.dumps(view).encode())
        self._names.add(self._name(image_id))

    def _name(self, image_id: str) -> str:
        return f"{self._prefix}{image_id}.json"

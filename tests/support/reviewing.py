"""Small bulk runs with referred images, and reviews of them."""

from __future__ import annotations

import io
import tarfile
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import Any

from jobs.review.driver import ReviewOptions, open_session
from jobs.review.session import Session
from scalp_core import storage
from scalp_core.datasets.manifest import image_id
from scalp_core.results.schema import RESULTS_FOLDER
from tests.support import result_rows
from tests.support.images import jpeg


def referred_row(uri: str, data: bytes, member: str | None = None, **changes: Any) -> dict[str, Any]:
    """A referred result row of an image with these bytes."""
    digest = sha256(data).hexdigest()
    identity = {"sha256": digest, "image_id": image_id(digest), "grade_set": [1, 2]}
    return result_rows.row(uri, member, refer=True, refer_reasons=["ambiguous_grade"], **(identity | changes))


def write_run(folder: Path, images: int) -> str:
    """Write `images` photographs, the last two in a zip and a tar, and a bulk run that refers them all.

    Returns:
        The output directory of the run.
    """
    rows = []
    for number in range(images):
        data, name = jpeg(number, (320, 240)), f"{number:02d}.jpg"
        uri, member = f"{folder}/images/{name}", None
        if number == images - 1:
            uri, member, data_of_file = f"{folder}/images/a.zip", name, _zip(name, data)
        elif number == images - 2:
            uri, member, data_of_file = f"{folder}/images/a.tar", name, _tar(name, data)
        else:
            data_of_file = data
        storage.write(uri, data_of_file)
        rows.append(referred_row(uri, data, member, grade=number % 4, sure=0.6 - number / 1000))
    rows.append(result_rows.row(f"{folder}/images/sure.jpg", image_id="sure", sha256="sure"))
    graded = f"{folder}/graded"
    result_rows.write(f"{graded}/{RESULTS_FOLDER}", rows)
    storage.write(f"{graded}/summary.json", b"{}")
    return graded


def open_review(graded: str, labels: str, reader: str = "kim", **options: Any) -> Session:
    """The session of a reader."""
    return open_session(graded, labels, ReviewOptions(reader, **options))


def ids(session: Session) -> list[str]:
    """Ids of the images of a session, in order."""
    found, image = [], session.describe()["first"]
    while image:
        found.append(image)
        image = session.image(image)["next"]
    return found


def _zip(name: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, data)
    return buffer.getvalue()


def _tar(name: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()

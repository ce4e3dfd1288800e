"""Small bulk runs with referred images, and reviews of them."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx

from jobs.common.local_executor import LocalExecutor
from jobs.data.prepare import prepare
from jobs.review.driver import ReviewOptions, open_session
from scalp_core import storage
from scalp_core.curation.audit import Options
from scalp_core.datasets.manifest import image_id
from scalp_core.results.schema import RESULTS_FOLDER
from scalp_core.results.store import StoreWriter
from scalp_core.review.readers import Readers
from scalp_core.review.referrals import read_referrals
from scalp_core.review.session import Session
from serving.auth.keys import new_key
from serving.auth.scopes import Rights
from tests.support import result_rows
from tests.support.images import jpeg
from tests.support.ports import free_port

REVIEW = "/v1/review"
"""Path of a review, in the command and in the endpoint."""

# Folder or zip of the images of one grade.
_SYNTH_FOLDER = re.compile(r"\[원천\]미세각질_(\d)\.")


def referred_row(uri: str, data: bytes, member: str | None = None, **changes: Any) -> dict[str, Any]:
    """A referred result row of an image with these bytes."""
    digest = sha256(data).hexdigest()
    identity = {"sha256": digest, "image_id": image_id(digest), "grade_set": [1, 2]}
    return result_rows.row(uri, member, refer=True, refer_reasons=["ambiguous_grade"], **(identity | changes))


def write_run(folder: Path | str, images: int, model_version: str = "made") -> str:
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
        answer = {"grade": number % 4, "sure": 0.6 - number / 1000, "model_version": model_version}
        rows.append(referred_row(uri, data, member, **answer))
    rows.append(result_rows.row(f"{folder}/images/sure.jpg", image_id="sure", sha256="sure"))
    graded = f"{folder}/graded"
    result_rows.write(f"{graded}/{RESULTS_FOLDER}", rows)
    storage.write(f"{graded}/summary.json", b"{}")
    return graded


def write_store(folder: Path | str, models: Sequence[str]) -> None:
    """Write a store of an endpoint with a referred photograph per entry, whose model version it is."""
    store = StoreWriter(str(folder), len(models))
    store.claim()
    for number, version in enumerate(models):
        data, graded_at = jpeg(number, (320, 240)), result_rows.AT + timedelta(minutes=number)
        store.add(data, referred_row("sent.jpg", data, model_version=version, graded_at=graded_at))


def write_training_images(folder: Path | str, count: int) -> str:
    """Write photographs as those of `write_run`, in other bytes, to folders of grades, and prepare them.

    Returns:
        The directory of the prepared data, in which most images are training images.
    """
    for number in range(count):
        data = jpeg(number, (320, 240), optimize=True)
        storage.write(f"{folder}/training/{number % 4}/{number:02d}.jpg", data)
    data = f"{folder}/data"
    prepare(f"{folder}/training", data, Options(ratio="8:1:1"), executor=LocalExecutor())
    return data


def open_review(graded: str, labels: str, reader: str = "kim", **options: Any) -> Session:
    """The session of a reader."""
    return open_session(graded, labels, ReviewOptions(reader, **options))


def open_readers(graded: str, labels: str, **options: Any) -> Readers:
    """The reviews of all readers, as the endpoint opens them."""
    return Readers(read_referrals(graded, labels, "referred"), labels, **options)


def ids(session: Session) -> list[str]:
    """Ids of the images of a session, in order."""
    found, image = [], session.describe()["first"]
    while image:
        found.append(image)
        image = session.image(image)["next"]
    return found


def write_keys(file: Path, **scopes: str) -> dict[str, str]:
    """Write a key file with a key per name, which has the scope; return the keys by name."""
    keys = {name: new_key(name, Rights.parse([scope])) for name, scope in scopes.items()}
    file.write_text("\n".join(line for _, line in keys.values()))
    file.chmod(0o600)
    return {name: key for name, (key, _) in keys.items()}


@dataclass(frozen=True)
class Review:
    """A running `scalp review`."""

    process: subprocess.Popen[str]
    url: str  # address of the page, with its token

    def kill(self) -> None:
        """End the process as a power cut would."""
        self.process.kill()
        self.process.wait()


@contextmanager
def scalp_review(*words: str) -> Iterator[Review]:
    """Run `scalp review WORDS`; at the end press Ctrl-C, which must end it without a traceback."""
    command = [sys.executable, "-m", "jobs.cli", "review", *words, "--port", str(free_port())]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout
        ready = next((line for line in process.stdout if line.startswith("READY")), "")
        try:
            assert ready, process.communicate()[1]
            yield Review(process, re.split(r"\s", ready)[1])
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGKILL)
    assert "Traceback" not in errors, errors


def answer_all(url: str, grades: Mapping[str, int]) -> int:
    """Answer the images of a running review as a browser does, one after the other.

    Args:
        url: Address of the page, with its token.
        grades: Grade by `image_id`.

    Returns:
        The number of answers.
    """
    with httpx.Client(base_url=url.partition("/?")[0], timeout=60) as client:
        client.get(url, follow_redirects=True).raise_for_status()
        image, answers = client.get(REVIEW).raise_for_status().json()["first_open"], 0
        while image:
            client.get(f"{REVIEW}/images/{image}/picture").raise_for_status()
            answered = client.post(f"{REVIEW}/images/{image}/answer", json={"grade": grades[image]})
            image, answers = answered.raise_for_status().json()["first_open"], answers + 1
    return answers


def read_grades(folder: Path) -> dict[str, int]:
    """Grades by `image_id` of the images below a folder that `scalp synth` drew, in files and zips."""
    grades = {}
    for path in folder.rglob("*"):
        named = _SYNTH_FOLDER.search(str(path.relative_to(folder)))
        if named and path.suffix == ".jpg":
            contents = [path.read_bytes()]
        elif named and path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                contents = [archive.read(name) for name in archive.namelist()]
        else:
            continue
        grades |= {image_id(sha256(content).hexdigest()): int(named[1]) for content in contents}
    return grades


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

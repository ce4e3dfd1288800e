"""`scalp review`: open the queue of a bulk run and the label log, and serve the page until Ctrl-C."""

from __future__ import annotations

import secrets
import socket
import unicodedata
from dataclasses import dataclass

import uvicorn

from jobs.common.console import console, show
from jobs.common.errors import printable
from jobs.review.app import create_app
from jobs.review.model_view import make_view, order_by_looks, select_graded
from scalp_core import storage
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.labels.decisions import Answers
from scalp_core.labels.log import KIND
from scalp_core.labels.queue import Order
from scalp_core.review.model_view import ModelView, open_bundle_of_run, open_comparing_bundle
from scalp_core.review.readers import Reader, Readers
from scalp_core.review.referrals import read_referrals
from scalp_core.review.session import Session
from scalp_core.storage import outputs
from serving.auth.network import check_port

HOST = "127.0.0.1"

# A reader waits this long for a storage server that restarts.
_RETRY_TIMEOUT_S = 20
_CLOSING_S = 3
_MAX_NAME = 64


@dataclass(frozen=True)
class ReviewOptions:
    """Options of a review.

    Args:
        reader: Name of the reader.
        show_model: Whether the reader sees the answer of the model.
        adjudicate: Whether the queue is of the images on which readers disagree.
        order: Strategy of the order.
        answered_too: Whether the queue holds answered images too.
        port: Port of the page on the loopback address.
        bundle: Bundle that graded the images, to offer its heatmaps; None: no view of the model.
        neighbors: Prepared data whose training images are offered where they look alike; needs `bundle`.
    """

    reader: str
    show_model: bool = False
    adjudicate: bool = False
    order: Order = "referred"
    answered_too: bool = False
    port: int = 8001
    bundle: str | None = None
    neighbors: str | None = None


def review(graded: str, labels: str, options: ReviewOptions) -> None:
    """Serve the page of a review until Ctrl-C.

    Args:
        graded: Output directory of `scalp grade` or `scalp audit-labels`, local or `s3://`.
        labels: Directory of the label log, local or `s3://`; created if it is missing.
        options: Options of the review.

    Raises:
        UserError: A directory is not what it should be, there is nothing to review, or the port is in use.
    """
    check_port(HOST, options.port)
    with storage.retry_timeout(_RETRY_TIMEOUT_S):  # also in the threads of the server
        session = open_session(graded, labels, options)
        if session.is_finished:
            return
        _serve(session, options.port)
    show(
        "review",
        {"answers saved": session.saved, "images left": session.left, "labels": storage.absolute(labels)},
    )


def open_session(graded: str, labels: str, options: ReviewOptions) -> Session:
    """Read the queue and the log, and print where the reader stands.

    Raises:
        UserError: As for `review`.
    """
    reader = Reader(check_name(options.reader), options.adjudicate)
    graded, labels = storage.absolute(graded), storage.absolute(labels)
    data = storage.absolute(options.neighbors) if options.neighbors else None
    if data and not options.bundle:
        raise UserError(f"--neighbors {data} needs the model that compares images; add --bundle BUNDLE")
    referrals = read_referrals(graded, labels, options.order, [data] if data else [])
    if not referrals.is_finished:
        console.print(f"{graded} is not finished: these are its referred images so far")
    bundle = open_bundle_of_run(options.bundle, referrals) if options.bundle else None
    compared_by = open_comparing_bundle(bundle, referrals) if options.order == "diverse" else None
    # Refused before LABELS is made.
    view = ModelView(bundle) if bundle and not data else None
    if data:
        manifest.read_spec(data)
    if compared_by:
        outputs.claim_output(labels, KIND)
        referrals = order_by_looks(compared_by, referrals, labels)
    readers = Readers(
        referrals,
        labels,
        shows_model=options.show_model,
        answered_too=options.answered_too,
        warn=console.print,
    )
    if not options.adjudicate:
        _greet(reader.name, readers.answers)
    session, queue = readers.open(reader), readers.queue(reader)
    _print_state(session, len(queue), readers.answers, options, referrals.noun)
    if view and bundle:
        select_graded(bundle, queue)
        session.offer(view)
    elif bundle and data and not session.is_finished:
        session.offer(make_view(bundle, data, queue, labels))
    return session


def check_name(reader: str) -> str:
    """Return the name of a reader in one Unicode form, without spaces around it.

    Raises:
        UserError: It is empty, too long, or has control characters.
    """
    name = unicodedata.normalize("NFC", reader).strip()
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise UserError(
            f"--reader {printable(reader)!r} is not a name; give 1 to {_MAX_NAME} printable characters"
        )
    return name


def _greet(name: str, answers: Answers) -> None:
    """Print the other names when a reader is new: a misspelled name would be another reader."""
    names = sorted({reader for of_image in answers.by_image.values() for reader in of_image})
    if names and name not in names:
        console.print(f"reader {name} is new in this log; readers so far: {', '.join(names)}")


def _print_state(session: Session, images: int, answers: Answers, options: ReviewOptions, noun: str) -> None:
    if options.adjudicate:
        elsewhere = sum(map(answers.differ, answers.by_image)) - images
        if elsewhere:
            console.print(f"readers disagree on {elsewhere:,} more images, which are not in this queue")
        if not images:
            console.print(f"readers disagree on none of the {noun}")
            return
        state = f"{images - session.left:,} of {images:,} images on which readers disagree are decided"
    else:
        state = f"{images - session.left:,} of {images:,} {noun} are answered by {session.reader}"
    console.print(state)
    if session.is_finished:
        console.print("none is left; --all opens them again")


def _serve(session: Session, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM; open answers are saved before it returns."""
    token = secrets.token_urlsafe(24)
    app = create_app(session, token, port)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=_CLOSING_S)
    with socket.create_server((HOST, port)) as listener:
        # Clients that connect from here on wait for the server.
        print(f"READY http://{HOST}:{port}/?token={token} (Ctrl-C ends it)", flush=True)  # noqa: T201
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn raises the signal again after it has closed
            print("stopping", flush=True)  # noqa: T201

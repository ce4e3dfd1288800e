"""The referred images of a bulk run, or of the store of an endpoint, read for a review."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.grades import SYMPTOM_IDS, name_symptom
from scalp_core.labels.log import KIND
from scalp_core.labels.queue import Order, Queue
from scalp_core.results.progress import IDENTITY_FILE
from scalp_core.results.query import ResultRows
from scalp_core.results.store import StoreReader, is_store
from scalp_core.review.groups import Place, read_groups
from scalp_core.storage import outputs

_COLUMNS = (
    "image_id, sha256, uri, member, grade, probabilities, expected_severity, grade_set, refer_reasons, "
    "model_version"
)


@dataclass(frozen=True)
class Referrals:
    """The referred images of a bulk run; `is_finished` if it has graded all images.

    A store of an endpoint has no end: it is finished, and `refresh` reads what was added or removed since.
    """

    graded: str
    queue: Queue
    is_finished: bool
    order: Order
    store: StoreReader | None = None  # if the images are those of a store

    def refresh(self) -> Referrals:
        """Read the images that are in the store now; those of a bulk run stay.

        Raises:
            UserError: storage failed.
        """
        return _read_store(self.graded, self.store, self.order) if self.store else self

    def groups(self, warn: Callable[[str], None]) -> dict[Place, str]:
        """Find the groups of the images in the sources of the run; see `read_groups`."""
        return read_groups(_identity(self.graded).get("sources", []), self.queue.locations(), warn)


def read_referrals(graded: str, labels: str, order: Order, inputs: Sequence[str] = ()) -> Referrals:
    """Read the referred images of a bulk run, and check that their answers may be written to `labels`.

    Args:
        graded: Output directory of `scalp grade`, or store of an endpoint, local or `s3://`.
        labels: Directory of the label log; it may be missing, and is not made.
        order: Strategy of the order.
        inputs: Further directories in which the log must not be.

    Raises:
        UserError: A directory is not what it should be, the run referred no image, or its grades are of a
            symptom other than micro-keratin, which readers grade. A store may be empty.
    """
    outputs.check_places([graded, *inputs], labels)
    outputs.check_claim(labels, KIND)
    if is_store(graded):
        return _read_store(graded, StoreReader(graded), order)
    with ResultRows(graded) as rows:
        check_symptom(graded, _identity(graded).get("symptom", SYMPTOM_IDS[0]))
        query = f"select {_COLUMNS} from results where refer"  # noqa: S608 -- columns are constants
        referrals = Referrals(graded, Queue(rows.stream(query).read_all(), order), rows.finished, order)
    if not len(referrals.queue):
        raise UserError(f"{graded} has no referred image to review; name another run of scalp grade")
    return referrals


def check_symptom(graded: str, symptom: str) -> None:
    """Check that grades are of the symptom that readers grade: the label log has no other.

    Raises:
        UserError: They are of another symptom.
    """
    if symptom != SYMPTOM_IDS[0]:
        raise UserError(
            f"the grades of {graded} are of {name_symptom(symptom)}, and readers grade "
            f"{name_symptom(SYMPTOM_IDS[0])}; name images that a model of micro-keratin graded"
        )


def _identity(graded: str) -> dict[str, Any]:
    return storage.read_json(storage.join(graded, IDENTITY_FILE)) or {}


def _read_store(graded: str, store: StoreReader, order: Order) -> Referrals:
    rows = store.read().filter(pc.field("refer")).select(_COLUMNS.split(", "))
    return Referrals(graded, Queue(rows, order), True, order, store)

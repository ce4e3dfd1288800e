"""The images of a review: referred by a bulk run or in the store of an endpoint, or with suspect labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.evaluation.label_errors import AUDIT_KIND
from scalp_core.grades import SYMPTOM_IDS, name_symptom
from scalp_core.labels.log import KIND
from scalp_core.labels.queue import Order, Queue, order_by_margin
from scalp_core.results.progress import IDENTITY_FILE
from scalp_core.results.query import ResultRows
from scalp_core.results.store import StoreReader, is_store
from scalp_core.review.features import FeatureFiles
from scalp_core.review.groups import Place, read_groups
from scalp_core.review.order import MOST_COMPARED, order_by_gain
from scalp_core.review.suspects import read_suspects
from scalp_core.storage import outputs

_COLUMNS = (
    "image_id, sha256, uri, member, grade, probabilities, expected_severity, grade_set, refer_reasons, "
    "model_version"
)


@dataclass(frozen=True)
class Referrals:
    """The images of a review: referred ones, or those whose labels are suspect.

    A store of an endpoint has no end: it is finished, and `refresh` reads what was added or removed since.

    Args:
        graded: Directory that was read.
        queue: Images in their order.
        is_finished: Whether a bulk run has graded all images.
        order: Strategy of the order.
        store: Store of an endpoint, if the images are its.
        ranks: Ranks of images for the order `diverse`, by `image_id`.
        suspects: Groups of the images, if a label audit found them.
    """

    graded: str
    queue: Queue
    is_finished: bool
    order: Order
    store: StoreReader | None = None
    ranks: Mapping[str, int] | None = None
    suspects: Mapping[Place, str] | None = None

    @property
    def noun(self) -> str:
        """Noun for the images of the queue, in messages."""
        return "referred images" if self.suspects is None else "images with suspect labels"

    @property
    def bundle(self) -> str | None:
        """Location of the bundle that graded all images of the run; None if it is not known."""
        return _identity(self.graded).get("bundle")

    def refresh(self) -> Referrals:
        """Read the images that are in the store now; those of a bulk run stay.

        Raises:
            UserError: storage failed.
        """
        return _read_store(self.graded, self.store, self.order, self.ranks) if self.store else self

    def groups(self, warn: Callable[[str], None]) -> Mapping[Place, str]:
        """Find the groups of the images in the sources of the run; see `read_groups`."""
        if self.suspects is not None:
            return self.suspects
        return read_groups(_identity(self.graded).get("sources", []), self.queue.locations(), warn)

    def rank(self, files: FeatureFiles, versions: Sequence[str]) -> Referrals:
        """Order the images by expected gain, of those that have features.

        Args:
            files: Features of a bundle.
            versions: Model versions of this bundle; images of others follow.

        Raises:
            UserError: Storage failed.
        """
        rows = self.candidates(versions)
        ids, features = files.read(rows["image_id"].to_pylist())
        compared = rows.filter(pc.is_in(rows["image_id"], pa.array(ids, pa.string())))
        drawn = order_by_gain(features, np.array(compared["probabilities"].to_pylist(), float))
        ranks = {ids[number]: rank for rank, number in enumerate(drawn.tolist())}
        return replace(self, ranks=ranks, queue=Queue(self.queue.rows, self.order, ranks))

    def candidates(self, versions: Sequence[str]) -> pa.Table:
        """Select the rows whose images `rank` compares: the least certain ones that these versions graded."""
        rows = self.queue.rows
        graded = rows.filter(pc.is_in(rows["model_version"], pa.array(versions, pa.string())))
        return graded.take(order_by_margin(graded)[:MOST_COMPARED])


def read_referrals(graded: str, labels: str, order: Order, inputs: Sequence[str] = ()) -> Referrals:
    """Read the images of a review, and check that their answers may be written to `labels`.

    Args:
        graded: Output directory of `scalp grade` or `scalp audit-labels`, or store of an endpoint; local or
            `s3://`.
        labels: Directory of the label log; it may be missing, and is not made.
        order: Strategy of the order; suspects of an audit have their own.
        inputs: Further directories in which the log must not be.

    Raises:
        UserError: A directory is not what it should be, the run referred no image, or its grades are of a
            symptom other than micro-keratin, which readers grade. A store may be empty.
    """
    outputs.check_places([graded, *inputs], labels)
    outputs.check_claim(labels, KIND)
    if is_store(graded):
        return _read_store(graded, StoreReader(graded), order)
    if outputs.kind_of(graded) == AUDIT_KIND:
        return _read_audit(graded, order)
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


def _read_store(
    graded: str, store: StoreReader, order: Order, ranks: Mapping[str, int] | None = None
) -> Referrals:
    rows = store.read().filter(pc.field("refer")).select(_COLUMNS.split(", "))
    return Referrals(graded, Queue(rows, order, ranks), True, order, store, ranks)


def _read_audit(graded: str, order: Order) -> Referrals:
    if order != "referred":
        raise UserError(
            f"--order {order} is for images that a model refers, and {graded} lists suspect labels, the "
            "likeliest errors first; omit --order"
        )
    symptom, rows, groups = read_suspects(graded)
    check_symptom(graded, symptom)
    return Referrals(graded, Queue(rows), True, order, suspects=groups)

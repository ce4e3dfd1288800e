"""The queue of a review: images in the order in which a reader gets them.

Two strategies order it. `referred` keeps the order of the rows. `informative` puts the images first of which
the model is least certain: the smallest margin between its two likeliest grades, then the largest grade set
(uncertainty sampling: Settles 2009, Active Learning Literature Survey, section 3.1). It does not spread the
images over different looks, because result rows hold no features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scalp_core.grades import NUM_GRADES

Order = Literal["referred", "informative"]


class Queue:
    """Images to review, in order; `rows` are their result rows.

    Args:
        rows: Result rows; of rows with equal bytes the first is kept.
        order: Strategy of the order.
    """

    def __init__(self, rows: pa.Table, order: Order = "referred") -> None:
        rows = rows.filter(pc.field("image_id").is_valid())
        ids = np.array(rows["image_id"].to_pylist(), dtype=object)
        rows = rows.take(np.sort(np.unique(ids.astype(str), return_index=True)[1]))
        if order == "informative":
            rows = rows.take(order_by_margin(rows))
        self.rows = rows
        self._ids: list[str] = rows["image_id"].to_pylist()
        self._places = {image_id: place for place, image_id in enumerate(self._ids)}

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._places

    def keep(self, is_kept: Callable[[str], bool]) -> Queue:
        """Make a queue of the images whose sha256 `is_kept` accepts, in the same order."""
        mask = [is_kept(sha256) for sha256 in self.rows["sha256"].to_pylist()]
        return Queue(self.rows.filter(pa.array(mask, pa.bool_())))

    def locations(self) -> set[tuple[str, str | None]]:
        """Return uri and member of each image."""
        columns = (self.rows[name].to_pylist() for name in ("uri", "member"))
        return set(zip(*columns, strict=True))

    def count(self, is_open: Callable[[str], bool]) -> int:
        """Count the images whose sha256 `is_open` accepts."""
        return sum(map(is_open, self.rows["sha256"].to_pylist()))

    def row(self, image_id: str) -> dict[str, Any]:
        """Return the result row of an image."""
        row: dict[str, Any] = self.rows.slice(self._places[image_id], 1).to_pylist()[0]
        return row

    def neighbors(self, image_id: str) -> dict[str, Any]:
        """Return `place` (from 1), and the ids `previous` and `next`, None at the ends."""
        place = self._places[image_id]
        return {
            "place": place + 1,
            "previous": self._ids[place - 1] if place else None,
            "next": self._ids[place + 1] if place + 1 < len(self) else None,
        }

    def first(self, is_open: Callable[[str], bool]) -> str | None:
        """Return the id of the first image whose sha256 `is_open` accepts; None without one."""
        for image_id, sha256 in zip(self._ids, self.rows["sha256"].to_pylist(), strict=True):
            if is_open(sha256):
                return image_id
        return None


def order_by_margin(rows: pa.Table) -> np.ndarray:
    """Order result rows by uncertainty: int (N,), indices of the rows, the least certain first.

    Args:
        rows: Rows with `probabilities` and `grade_set`.
    """
    probabilities = np.array(rows["probabilities"].to_pylist(), float).reshape(-1, NUM_GRADES)
    highest = np.sort(probabilities, axis=1)[:, -2:]
    sizes = pc.list_value_length(rows["grade_set"]).to_numpy()
    # Rounded, so that differences in the last bits do not decide; `lexsort` keeps the order of equals.
    return np.lexsort((-sizes, np.round(highest[:, 1] - highest[:, 0], 6)))

"""The queue of a review: images in the order in which a reader gets them.

Three strategies order it. `referred` keeps the order of the rows. `informative` puts the images first of
which the model is least certain: the smallest margin between its two likeliest grades, then the largest
grade set (uncertainty sampling: Settles 2009, Active Learning Literature Survey, section 3.1). `diverse`
puts images first that are uncertain and look different, by the ranks of `scalp_core.review.order`. Images
without a rank follow, ordered as by `informative`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scalp_core.grades import NUM_GRADES

Order = Literal["referred", "informative", "diverse"]


class Queue:
    """Images to review, in order. Queues that `keep` makes share the rows: they take 4 bytes per image.

    Args:
        rows: Result rows; of rows with equal bytes the first is kept.
        order: Strategy of the order.
        ranks: Rank of images by `image_id`, for `diverse`.
    """

    def __init__(
        self, rows: pa.Table, order: Order = "referred", ranks: Mapping[str, int] | None = None
    ) -> None:
        rows = rows.filter(pc.field("image_id").is_valid())
        ids = np.array(rows["image_id"].to_pylist(), dtype=object)
        rows = rows.take(np.sort(np.unique(ids.astype(str), return_index=True)[1]))
        if order != "referred":
            rows = rows.take(order_by_margin(rows))
        if ranks:
            of_rows = [ranks.get(image_id, len(ranks)) for image_id in rows["image_id"].to_pylist()]
            rows = rows.take(np.argsort(of_rows, kind="stable"))
        self._rows = rows
        self._ids: list[str] = rows["image_id"].to_pylist()
        self._hashes: list[str] = rows["sha256"].to_pylist()
        self._numbers = {image_id: number for number, image_id in enumerate(self._ids)}  # of rows
        self._kept = np.arange(len(rows), dtype=np.int32)  # numbers of the rows in this queue, ascending

    @property
    def rows(self) -> pa.Table:
        """Result rows of the images."""
        return self._rows.take(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, image_id: str) -> bool:
        number = self._numbers.get(image_id)
        if number is None:
            return False
        place = int(np.searchsorted(self._kept, number))
        return place < len(self) and bool(self._kept[place] == number)

    def keep(self, is_kept: Callable[[str], bool]) -> Queue:
        """Make a queue of the images whose sha256 `is_kept` accepts, in the same order."""
        queue = copy.copy(self)
        kept = [number for number in self._kept.tolist() if is_kept(self._hashes[number])]
        queue._kept = np.array(kept, np.int32)
        return queue

    def locations(self) -> set[tuple[str, str | None]]:
        """Return uri and member of each image."""
        columns = (self._rows[name].take(self._kept).to_pylist() for name in ("uri", "member"))
        return set(zip(*columns, strict=True))

    def count(self, is_open: Callable[[str], bool]) -> int:
        """Count the images whose sha256 `is_open` accepts."""
        return sum(is_open(self._hashes[number]) for number in self._kept.tolist())

    def row(self, image_id: str) -> dict[str, Any]:
        """Return the result row of an image."""
        row: dict[str, Any] = self._rows.slice(self._numbers[image_id], 1).to_pylist()[0]
        return row

    def neighbors(self, image_id: str) -> dict[str, Any]:
        """Return `place` (from 1), and the ids `previous` and `next`, None at the ends."""
        place = int(np.searchsorted(self._kept, self._numbers[image_id]))
        return {
            "place": place + 1,
            "previous": self._ids[self._kept[place - 1]] if place else None,
            "next": self._ids[self._kept[place + 1]] if place + 1 < len(self) else None,
        }

    def first(self, is_open: Callable[[str], bool]) -> str | None:
        """Return the id of the first image whose sha256 `is_open` accepts; None without one."""
        numbers = (number for number in self._kept.tolist() if is_open(self._hashes[number]))
        number = next(numbers, None)
        return None if number is None else self._ids[number]


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

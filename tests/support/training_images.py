"""Manifest rows of small images, for tests of training's data ingest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from tests.support.images import jpeg

ROWS = 80  # more than one block of 64


def write_rows(folder: Path) -> pa.Table:
    """Write `ROWS` images to `folder`, and return their rows."""
    places = [folder / f"{number}.jpg" for number in range(ROWS)]
    for number, place in enumerate(places):
        place.write_bytes(jpeg(number, (32, 24)))
    labels = pa.array(np.arange(ROWS) % 4, pa.int8())
    return pa.table(
        {"uri": [str(place) for place in places], "member": pa.nulls(ROWS, pa.string()), "label": labels}
    )

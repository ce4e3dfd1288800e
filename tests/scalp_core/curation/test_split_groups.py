import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from scalp_core.curation.split_groups import MAX_JOINED, group_images, number_components, unite


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(20, 60), device=st.integers(2, 30), content=st.integers(5, 50), seed=st.integers(0, 1000)
)
def test_what_any_chain_of_keys_joins_is_one_group(rows, device, content, seed):
    rng = np.random.default_rng(seed)
    keys = [rng.integers(0, size, rows).astype(np.uint64) for size in (device, content)]
    edges = rng.integers(0, rows, (rng.integers(0, 5), 2))
    keys.append(number_components(edges, rows))
    groups = unite(keys, rows)
    for key in keys:
        for value in set(key.tolist()) - {0}:
            assert len(set(groups[key == value])) == 1
    assert all(groups[a] == groups[b] for a, b in edges)
    # And nothing else: as many groups as a plain walk finds.
    seen, count = set(), 0
    for start in range(rows):
        count += start not in seen
        todo = [start] if start not in seen else []
        while todo:
            row = todo.pop()
            seen.add(row)
            near = {int(b) for a, b in edges if a == row} | {int(a) for a, b in edges if b == row}
            for key in keys:
                near |= set(np.flatnonzero(key == key[row]).tolist()) if key[row] > 0 else set()
            todo += near - seen
    assert len(set(groups)) == count


def group(devices, shown, flat=()):
    """Groups of images, each of a microscope (0: not known) that shows something."""
    is_flat = np.isin(np.arange(len(shown)), list(flat))
    return group_images([np.array(devices, np.uint64)], np.array(shown, np.uint64), is_flat)


def test_an_image_joins_few_microscopes_and_not_many():
    few = group([1, 2, 3, 1, 2, 3, 4], [9, 9, 9, 1, 2, 3, 4])
    assert len(set(few.of_row[:6])) == 1
    assert few.of_row[6] not in few.of_row[:6]
    assert len(few.refused) == 0
    devices = list(range(1, MAX_JOINED + 2))
    many = group(devices, [9] * len(devices))
    assert len(set(many.of_row)) == len(devices)
    assert many.refused[:, 1:].tolist() == [[len(devices), len(devices)]]


def test_copies_without_a_microscope_are_one_group_however_many():
    found = group([0] * 20, [9] * 20)
    assert len(set(found.of_row)) == 1
    assert len(found.refused) == 0


def test_an_image_of_one_color_joins_no_two_microscopes():
    found = group([1, 2, 2], [9, 9, 8], flat=[0, 1])
    assert found.of_row.tolist()[1:] == [found.of_row[1]] * 2
    assert found.of_row[0] != found.of_row[1]
    assert len(found.refused) == 1

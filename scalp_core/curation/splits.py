"""Assign train, validation and test splits and folds: by group, as delivered, or at random.

An integer program (scipy.optimize.milp, HiGHS) assigns groups to splits. Shares, groups per split and grades
per split are soft bounds with a high penalty, so that each source has a solution.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from scalp_core.datasets.manifest import SPLITS
from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES

Ratio = tuple[int, int, int]


MAX_FOLDS = 128  # a fold is an int8 in the manifest
MIN_GROUPS = 2
"""Least groups per split: a confidence interval needs more than one group."""

# Penalties of the program, each far above the sum of all lower ones.
_NO_IMAGE, _GRADE_MISSING_IN_TRAIN, _TOO_FEW_GROUPS, _GRADE_MISSING = 1e4, 1e3, 300.0, 100.0
_FREE_DEVIATION = 0.02  # deviation of a share, and of a grade's share, without a penalty
_GRADE_WEIGHT = 0.25  # weight of a grade's share, relative to the share of all images
_MAX_ITEMS = 240
_OPTIONS = {
    "node_limit": 50,
    "mip_rel_gap": 0.05,
}  # no time limit: the answer must not depend on the machine


def parse_ratio(text: str) -> Ratio:
    """Parse a split ratio such as `7:2:1`: train, validation and test.

    Raises:
        UserError: the text is not three positive integers.
    """
    try:
        train, val, test = (int(number) for number in text.split(":"))
    except ValueError:
        raise UserError(f"--ratio {text} is not a ratio; write TRAIN:VAL:TEST, for example 7:2:1") from None
    if min(train, val, test) < 1 or train + val + test > 100:
        raise UserError(f"--ratio {text} is out of range; give numbers from 1, with a sum up to 100")
    common = gcd(train, val, test)
    return train // common, val // common, test // common


def split_by_group(labels: np.ndarray, groups: np.ndarray, ratio: Ratio, seed: int) -> np.ndarray:
    """Assign complete groups to splits so that each split has about its share of each grade.

    Args:
        labels: int (N,), 0..3.
        groups: (N,); rows of one group stay together.
        ratio: Shares of train, validation and test.
        seed: Random seed for the order of equal choices.

    Returns:
        str (N,): train, val or test.

    Raises:
        UserError: fewer groups than splits.
    """
    return _assign(labels, groups, dict(zip(SPLITS, ratio, strict=True)), seed)


def split_as_delivered(
    labels: np.ndarray, groups: np.ndarray, delivered: np.ndarray, ratio: Ratio, seed: int
) -> np.ndarray:
    """Split as delivered, without the overlap: Validation is the test split, Training is split by group.

    Args as `split_by_group`, and `delivered`: str (N,), Training or Validation.

    Returns:
        object (N,): train, val, test; None for a Training row whose group is also in Validation.

    Raises:
        UserError: a row is in neither delivered split, or Training has too few groups.
    """
    if not {"Training", "Validation"} <= set(delivered) or set(delivered) - {"Training", "Validation"}:
        raise UserError(
            "--split-by official needs each image below a folder Training or Validation, and both folders; "
            "use --split-by group for a source without them"
        )
    held_out = np.isin(groups, groups[delivered == "Validation"])
    parts = np.full(len(labels), None, dtype=object)
    parts[delivered == "Validation"] = "test"
    rest = np.flatnonzero(~held_out)
    parts[rest] = _assign(labels[rest], groups[rest], {"train": ratio[0], "val": ratio[1]}, seed)
    return parts


def extend_splits(known: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Assign the new images of extended data to train; images of the data keep their splits.

    Val and test stay as they are, so that models before and after are compared on the same images, which no
    queue of uncertain images has changed.

    Args:
        known: object (N,), the split of an image of the extended data; None for a new one.
        groups: (N,), group of each image.

    Returns:
        object (N,): train, val, test; "held_out" for a new image whose group is in val or test.
    """
    held_out = np.isin(groups, groups[np.isin(known.astype(str), SPLITS[1:])])
    return np.where(known != None, known, np.where(held_out, "held_out", "train"))  # noqa: E711


def split_at_random(labels: np.ndarray, ratio: Ratio, seed: int) -> np.ndarray:
    """Split by image, stratified by grade, as the paper did; people and microscopes are in all splits."""
    return _assign(labels, np.arange(len(labels)), dict(zip(SPLITS, ratio, strict=True)), seed)


def assign_folds(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Assign folds for cross-validation by group, stratified by grade; int (N,), 0 to `folds` - 1.

    Raises:
        UserError: fewer groups than folds, or more folds than the manifest can store.
    """
    if folds > MAX_FOLDS:
        raise UserError(f"--folds {folds} is too many; give {MAX_FOLDS} or fewer")
    counts, of_row = _group_counts(labels, groups)
    _check_groups(len(counts), folds, f"--folds {folds}")
    items, of_group = _items(counts, seed, max(_MAX_ITEMS, 8 * folds))
    # The largest first, each into the fold that has the least of its grades.
    shares = items / np.maximum(items.sum(axis=0), 1)
    filled = np.zeros((folds, NUM_GRADES))
    fold_of_item = np.empty(len(items), int)
    for item in np.argsort(-items.sum(axis=1), kind="stable"):
        fold = int((filled @ (shares[item] + shares[item].sum() / NUM_GRADES)).argmin())
        filled[fold] += shares[item]
        fold_of_item[item] = fold
    return fold_of_item[of_group][of_row]


def count_leaking_pairs(key: np.ndarray, parts: np.ndarray) -> int:
    """Count pairs of rows in different splits that share a key.

    Args:
        key: Uint64 (N,); 0 is a missing key.
        parts: Object (N,), names of splits.
    """
    known = key != 0
    code = np.unique(key[known], return_inverse=True)[1]
    counts = [np.bincount(code[parts[known] == name], minlength=1 + code.max(initial=-1)) for name in SPLITS]
    table = np.stack(counts, axis=1)
    return int((table.sum(axis=1) ** 2 - (table**2).sum(axis=1)).sum() // 2)


def _assign(labels: np.ndarray, groups: np.ndarray, shares: dict[str, int], seed: int) -> np.ndarray:
    option = "--ratio " + ":".join(map(str, shares.values()))
    counts, of_row = _group_counts(labels, groups)
    _check_groups(len(counts), len(shares), option)
    items, of_group = _items(counts, seed)
    sizes = np.bincount(of_group)
    chosen = _solve(items, sizes, np.array(list(shares.values())) / sum(shares.values()))
    return np.array(list(shares), dtype=object)[chosen[of_group][of_row]]


def _check_groups(groups: int, splits: int, option: str) -> None:
    if groups < splits:
        raise UserError(
            f"{option}: {groups} group{'s' * (groups != 1)} cannot be divided into {splits}; use more "
            "microscopes, or a finer --group session, without near_duplicate if similar images join groups"
        )


def _group_counts(labels: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count images of each grade in each group, int (G, 4); also returns the group of each row."""
    distinct, of_row = np.unique(groups, return_inverse=True)
    cells = np.bincount(of_row * NUM_GRADES + labels, minlength=len(distinct) * NUM_GRADES)
    return cells.reshape(-1, NUM_GRADES), of_row


def _items(counts: np.ndarray, seed: int, most: int = _MAX_ITEMS) -> tuple[np.ndarray, np.ndarray]:
    """Reduce groups to at most `most` items of the program: large ones alone, others in similar bundles.

    From counts, int (G, 4), of images of each grade; returns int (items, 4), and the item of each group.
    """
    order = np.random.default_rng(seed).permutation(len(counts))
    sizes = counts[order].sum(axis=1)
    if len(counts) <= most:
        of_group = np.empty(len(counts), int)
        of_group[order] = np.arange(len(counts))
        return counts[order], of_group
    order = order[np.argsort(-sizes, kind="stable")]
    alone, bundles = most // 2, most - most // 2
    rest = order[alone:]
    # Similar groups are adjacent, so that each bundle gets the same grades and sizes.
    main_grade = counts[rest].argmax(axis=1)
    rest = rest[np.lexsort((-counts[rest].sum(axis=1), main_grade))]
    of_group = np.empty(len(counts), int)
    of_group[order[:alone]] = np.arange(alone)
    of_group[rest] = alone + np.arange(len(rest)) % bundles
    items = np.zeros((most, NUM_GRADES), int)
    np.add.at(items, of_group, counts)
    return items, of_group


def _solve(items: np.ndarray, groups: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Assign a split to each item by an integer program; int (items,).

    Its variables are one choice for each item and split, then one slack for each bound and split.

    Args:
        items: Int (items, 4), images of each grade.
        groups: Int (items,), groups in each item.
        shares: Share of each split, summing to 1.
    """
    number, splits = len(items), len(shares)
    sizes = items.sum(axis=1)
    grades = items[:, items.sum(axis=0) > 0]
    few = min(MIN_GROUPS, int(groups.sum()) // splits)
    at_least = [(sizes > 0, 1.0, np.full(splits, _NO_IMAGE)), (groups, few, np.full(splits, _TOO_FEW_GROUPS))]
    grade_prices = np.full(splits, _GRADE_MISSING)
    grade_prices[0] = _GRADE_MISSING_IN_TRAIN
    at_least += [(grade > 0, 1.0, grade_prices) for grade in grades.T]
    rows, lower, upper, signs, prices = [], [], [], [], []

    def bound(weights: np.ndarray, least: Any, most: Any, sign: int, price: Any) -> None:
        """Add a constraint per split: the weights of its items, plus or minus a slack with a penalty."""
        rows.append(np.kron(weights, np.eye(splits)) if weights.ndim == 1 else weights)
        lower.append(np.broadcast_to(least, splits))
        upper.append(np.broadcast_to(most, splits))
        signs.append(sign)
        prices.append(np.broadcast_to(price, splits))

    for weights, least, price in at_least:
        bound(weights.astype(float), least, np.inf, 1, price)
    for column, weight in [(sizes, 1.0), *((grade, _GRADE_WEIGHT) for grade in grades.T)]:
        # As a multiple of the target of the split, so that a small split is as exact as a large one.
        of_wanted = np.kron(column / column.sum(), np.diag(1 / shares))
        bound(of_wanted, 1 - _FREE_DEVIATION, np.inf, 1, weight)
        bound(of_wanted, -np.inf, 1 + _FREE_DEVIATION, -1, weight)
    slacks = splits * len(rows)
    choices = number * splits
    one_each = np.hstack([np.kron(np.eye(number), np.ones(splits)), np.zeros((number, slacks))])
    bounded = np.hstack([np.vstack(rows), np.diag(np.repeat(signs, splits).astype(float))])
    constraint = LinearConstraint(
        csr_array(np.vstack([one_each, bounded])),
        np.concatenate([np.ones(number), *lower]),
        np.concatenate([np.ones(number), *upper]),
    )
    is_choice = np.arange(choices + slacks) < choices
    solution = milp(
        np.concatenate([np.zeros(choices), *prices]),
        integrality=is_choice.astype(int),
        bounds=Bounds(0, np.where(is_choice, 1, np.inf)),
        constraints=constraint,
        options=_OPTIONS,
    )
    return solution.x[:choices].reshape(number, splits).argmax(axis=1)

"""Train, validation and test parts, and what they share: by group, as delivered, or at random."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import combinations, islice
from math import gcd

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES
from scalp_core.manifest import PARTS

Ratio = tuple[int, int, int]

_MOST_ASSIGNMENTS = 20_000


def parse_ratio(text: str) -> Ratio:
    """`7:2:1` as train, validation and test.

    Raises:
        UserError: it is not three positive whole numbers.
    """
    try:
        train, val, test = (int(number) for number in text.split(":"))
    except ValueError:
        raise UserError(f"--split {text}: write TRAIN:VAL:TEST, for example 7:2:1") from None
    if min(train, val, test) < 1 or train + val + test > 100:
        raise UserError(f"--split {text}: each number must be 1 or more, and their sum 100 or less")
    common = gcd(train, val, test)
    return train // common, val // common, test // common


def unite(keys: Iterable[np.ndarray], edges: np.ndarray, rows: int) -> np.ndarray:
    """Groups of rows that are joined by any chain of shared keys and edges; int (rows,).

    Args:
        keys: int (rows,) each; rows with the same number share the key, a negative number is no key.
        edges: int (E, 2), pairs of rows that belong together.
        rows: how many.
    """
    left, right, nodes = [edges[:, 0]], [edges[:, 1]], rows
    for key in keys:
        known = np.flatnonzero(key >= 0)
        left.append(known)
        right.append(nodes + key[known])
        nodes += int(key.max(initial=-1)) + 1
    ends = np.concatenate(left), np.concatenate(right)
    graph = coo_array((np.ones(len(ends[0]), np.int8), ends), shape=(nodes, nodes))
    return connected_components(graph, directed=False)[1][:rows]


def by_group(labels: np.ndarray, groups: np.ndarray, ratio: Ratio, seed: int) -> np.ndarray:
    """Assigns whole groups to parts so that each part has about its share of every grade.

    Args:
        labels: int (N,), 0..3.
        groups: (N,); rows of one group stay together.
        ratio: shares of train, validation and test.
        seed: of the order in which equal choices are made.

    Returns:
        str (N,): train, val or test.

    Raises:
        UserError: there are fewer groups than the ratio has folds.
    """
    return _assign(labels, groups, dict(zip(PARTS, ratio, strict=True)), seed)


def official(
    labels: np.ndarray, groups: np.ndarray, delivered: np.ndarray, ratio: Ratio, seed: int
) -> np.ndarray:
    """The delivered parts less their overlap: Validation is the test part, Training is divided by group.

    Args:
        labels: int (N,).
        groups: (N,).
        delivered: str (N,), Training or Validation.
        ratio: of train and validation; its third number is not used.
        seed: as for `by_group`.

    Returns:
        object (N,): train, val, test; None for a Training row whose group is in Validation too.

    Raises:
        UserError: a row is in neither part, or Training has too few groups.
    """
    if not {"Training", "Validation"} <= set(delivered) or set(delivered) - {"Training", "Validation"}:
        raise UserError(
            "--split-by official needs every photograph below a folder Training or Validation, and both; "
            "use --split-by group for a source without them"
        )
    held_out = np.isin(groups, groups[delivered == "Validation"])
    parts = np.full(len(labels), None, dtype=object)
    parts[delivered == "Validation"] = "test"
    rest = np.flatnonzero(~held_out)
    parts[rest] = _assign(labels[rest], groups[rest], {"train": ratio[0], "val": ratio[1]}, seed)
    return parts


def at_random(labels: np.ndarray, ratio: Ratio, seed: int) -> np.ndarray:
    """By photograph, stratified by grade, as the paper did: people and microscopes are in every part."""
    return _assign(labels, np.arange(len(labels)), dict(zip(PARTS, ratio, strict=True)), seed)


def k_folds(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Folds for cross-validation, 0 to `folds` - 1, no group in two, stratified by grade; int (N,).

    Raises:
        UserError: there are fewer groups than folds.
    """
    return _folds(labels, groups, folds, seed, f"--folds {folds}")


def leaking_pairs(key: np.ndarray, parts: np.ndarray) -> int:
    """Pairs of rows in different parts that share a key.

    Args:
        key: int (N,); negative is no key.
        parts: (N,).
    """
    known = key >= 0
    if not known.any():
        return 0
    codes = np.unique(parts[known].astype(str), return_inverse=True)[1]
    counts = np.zeros((int(key.max()) + 1, int(codes.max()) + 1), np.int64)
    np.add.at(counts, (key[known], codes), 1)
    return int((counts.sum(axis=1) ** 2 - (counts**2).sum(axis=1)).sum() // 2)


def _assign(labels: np.ndarray, groups: np.ndarray, shares: dict[str, int], seed: int) -> np.ndarray:
    names = "".join(f":{share}" for share in shares.values())[1:]
    folds = _folds(labels, groups, sum(shares.values()), seed, f"--split {names}")
    counts = np.zeros((sum(shares.values()), NUM_GRADES))
    np.add.at(counts, (folds, labels), 1)
    return np.array(_best_parts(counts, shares), dtype=object)[folds]


def _folds(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int, option: str) -> np.ndarray:
    distinct = len(np.unique(groups))
    if distinct < folds:
        raise UserError(
            f"{option}: {distinct} groups cannot be divided into {folds}; "
            "use smaller numbers (--split 2:1:1), more devices, or a finer --group session"
        )
    alone = distinct == len(groups)  # the way by groups takes a second for ten thousand of them
    kind = StratifiedKFold if alone else StratifiedGroupKFold
    result = np.empty(len(labels), int)
    with warnings.catch_warnings():
        # A grade rarer than the folds is spread as well as it goes; the summary shows the counts.
        warnings.filterwarnings("ignore", message="The least populated class")
        splitter = kind(n_splits=folds, shuffle=True, random_state=seed)
        for fold, (_, rows) in enumerate(splitter.split(labels, labels, None if alone else groups)):
            result[rows] = fold
    return result


def _best_parts(counts: np.ndarray, shares: dict[str, int]) -> list[str]:
    """Which fold goes to which part, so that parts are most alike; the name of each fold's part.

    Args:
        counts: (folds, 4), photographs of each grade in each fold.
        shares: folds of each part; the first takes what the others leave.
    """
    folds = range(len(counts))
    first, *others = shares
    best: list[str] = [first] * len(counts)
    best_off: tuple[float, ...] = (np.inf,)
    for chosen in islice(_choices(frozenset(folds), [shares[name] for name in others]), _MOST_ASSIGNMENTS):
        parts = [first] * len(counts)
        for name, taken in zip(others, chosen, strict=True):
            for fold in taken:
                parts[fold] = name
        off = _unlikeness(counts, parts, shares)
        if off < best_off:
            best, best_off = parts, off
    return best


def _choices(folds: frozenset[int], sizes: list[int]) -> Iterable[list[tuple[int, ...]]]:
    if not sizes:
        yield []
        return
    # The smallest part last in `sizes` is chosen first: there are fewest ways to choose it.
    for taken in combinations(sorted(folds), sizes[-1]):
        for rest in _choices(folds - set(taken), sizes[:-1]):
            yield [*rest, taken]


def _unlikeness(counts: np.ndarray, parts: list[str], shares: dict[str, int]) -> tuple[float, ...]:
    """What to make small: grades that the first part lacks, that any lacks, and how far a share is off."""
    total, grades = counts.sum(), counts.sum(axis=0)
    lacking, worst = [], 0.0
    for name, share in shares.items():
        own = counts[[part == name for part in parts]].sum(axis=0)
        lacking.append(int(((own == 0) & (grades > 0)).sum()))
        off = np.abs(own / max(own.sum(), 1) - grades / total).max()
        worst = max(worst, float(off), abs(float(own.sum() / total) - share / len(parts)))
    return lacking[0], sum(lacking), worst

"""Train, validation and test parts that share no group: stratified by grade, by seed."""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from scalp_core.errors import UserError
from scalp_core.manifest import PARTS

Ratio = tuple[int, int, int]


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
    return train, val, test


def split_by_group(labels: np.ndarray, groups: np.ndarray, ratio: Ratio, seed: int) -> np.ndarray:
    """Assigns whole groups to parts so that each part has about its share of every grade.

    Args:
        labels: int (N,), 0..3.
        groups: str (N,); rows of one group stay together.
        ratio: shares of train, validation and test.
        seed: of the order in which equal choices are made.

    Returns:
        str (N,): train, val or test.

    Raises:
        UserError: there are fewer groups than the ratio has folds.
    """
    folds = sum(ratio)
    distinct = len(np.unique(groups))
    if distinct < folds:
        raise UserError(
            f"{distinct} groups cannot be split {':'.join(map(str, ratio))}: at least {folds} are needed; "
            "use smaller numbers (--split 2:1:1) or more devices"
        )
    parts = np.empty(len(labels), dtype=object)
    with warnings.catch_warnings():
        # A grade rarer than the folds is spread as well as it goes; the summary shows the counts.
        warnings.filterwarnings("ignore", message="The least populated class")
        splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
        names = np.repeat(PARTS, ratio)
        for name, (_, rows) in zip(names, splitter.split(labels, labels, groups), strict=True):
            parts[rows] = name
    return parts

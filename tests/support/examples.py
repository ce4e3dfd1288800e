"""Amounts of examples of property tests: few in each run, more with `--hypothesis-profile nightly`."""

from __future__ import annotations

from hypothesis import settings

NIGHTLY = "nightly"


def examples(few: int, many: int) -> int:
    """Choose the amount for the profile in use."""
    return many if settings.get_current_profile_name() == NIGHTLY else few

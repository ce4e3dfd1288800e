"""Plots that are built and not drawn, for tests that do not look at them."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from scalp_core.evaluation import figures


def leave_undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write empty files instead of plots; drawing one takes a tenth of a second."""

    def close(figure: Figure) -> bytes:
        plt.close(figure)
        return b""

    monkeypatch.setattr(figures, "_png", close)

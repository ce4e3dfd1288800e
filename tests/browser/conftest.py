"""A real browser, that asks nobody for anything by itself."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

DESKTOP = {"width": 1200, "height": 860}
PHONE = {"width": 390, "height": 844}

# The browser itself must not reach out either: no updates, no safe-browsing lists, no QUIC.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


# Playwright's event loop runs as long as this, and other tests begin loops of their own.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "these tests drive Debian's chromium: apt-get install chromium fonts-nanum"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()

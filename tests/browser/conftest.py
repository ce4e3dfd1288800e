"""A real browser, that asks nobody for anything by itself, and the real endpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.support.served import Served

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
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]


# Playwright's event loop runs as long as this, and other tests begin loops of their own.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("these tests need Debian's chromium; install it with: make browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def origin(endpoint: Served) -> str:
    return endpoint.origin


REFUSED = (
    "the server responded with a status of"  # the browser itself reports a 4xx or 5xx answer in the console
)


@contextmanager
def watched_pages(
    browser: Browser, own: tuple[str, ...], known: tuple[str, ...]
) -> Iterator[Callable[..., Page]]:
    """Make pages; afterwards, check what they asked for, and their consoles.

    Args:
        own: Starts of the addresses that a page may ask for.
        known: Parts of the errors that are expected.
    """
    contexts: list[BrowserContext] = []
    requests: list[str] = []
    errors: list[str] = []

    def new_page(**options: Any) -> Page:
        context = browser.new_context(**{"viewport": DESKTOP, "locale": "en-US", **options})
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        return page

    yield new_page
    for context in contexts:
        context.close()
    assert [url for url in requests if not url.startswith(own)] == []
    assert [error for error in errors if not any(text in error for text in known)] == []


Visit = Callable[..., Page]


@pytest.fixture
def visit(browser: Browser, origin: str) -> Iterator[Visit]:
    """Opens the page; afterwards, that it asked no other host and that its console has no error.

    `prepare` is given the page before it is opened; all else goes to the browser's context.
    """
    own = (f"{origin}/", f"blob:{origin}/", "data:")
    with watched_pages(browser, own, known=(REFUSED,)) as new_page:

        def open_page(prepare: Callable[[Page], Any] | None = None, **options: Any) -> Page:
            page = new_page(**options)
            if prepare:
                prepare(page)
            page.goto(origin)
            return page

        yield open_page


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens a review; afterwards, that it asked no other host and that its console has no error."""
    own = ("http://127.0.0.1:", "blob:", "data:")
    with watched_pages(
        browser, own, known=(REFUSED, "net::ERR_CONNECTION")
    ) as new_page:  # of a killed server

        def open_in_browser(url: str, **options: Any) -> Page:
            page = new_page(**options)
            page.goto(url)
            return page

        yield open_in_browser

"""What a person does with the page, and what the endpoint says of the same photograph."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import httpx
from playwright.sync_api import Page, Route, expect


def photograph(data: bytes, name: str = "a.jpg") -> dict[str, Any]:
    """A file for the page's file field."""
    return {"name": name, "mimeType": "image/jpeg", "buffer": data}


def choose(page: Page, *files: dict[str, Any]) -> None:
    """Chooses files and waits until all are graded or failed."""
    page.set_input_files("#file", list(files))
    expect(page.locator("#progress")).to_be_hidden()


def drop(page: Page, data: bytes, name: str, kind: str) -> None:
    """A real drop event with a file, as the operating system's file manager makes it."""
    transfer = page.evaluate_handle(
        """([text, name, type]) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            transfer.items.add(new File([bytes], name, { type }));
            return transfer;
        }""",
        [base64.b64encode(data).decode(), name, kind],
    )
    for event in ("dragover", "drop"):
        page.dispatch_event("#drop", event, {"dataTransfer": transfer})


def answer_of(origin: str, data: bytes, **fields: str) -> dict[str, Any]:
    """What the endpoint answers for these bytes."""
    answer = httpx.post(f"{origin}/v1/grade", files={"file": data}, data=fields, timeout=60)
    return answer.raise_for_status().json()


def refuse(status: int, code: str, **headers: str) -> Callable[[Route], None]:
    """A handler that answers with a problem, as the endpoint would."""
    problem = {"title": "", "status": status, "code": code, "detail": f"{code} in the server's words"}
    headers = {"Content-Type": "application/problem+json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    return lambda route: route.fulfill(status=status, headers=headers, json=problem)


def changed(**fields: Any) -> Callable[[Route], None]:
    """A handler that lets the endpoint answer and changes fields of its answer."""

    def handle(route: Route) -> None:
        response = route.fetch()
        route.fulfill(response=response, json=response.json() | fields)

    return handle


def scrolls_sideways(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth > window.innerWidth")


def is_photo_shown(page: Page, place: int, images: int) -> None:
    """Waits until a photo of a review can be answered."""
    expect(page.locator("#place")).to_have_text(f"Photo {place} of {images}")
    expect(page.locator(".answer").first).to_have_attribute("aria-disabled", "false")


def enter_key(page: Page, key: str) -> None:
    """Enters an access key in the page of a review."""
    page.get_by_label("Access key", exact=True).fill(key)
    page.keyboard.press("Enter")

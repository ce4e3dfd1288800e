"""A parsed HTML report of `scalp grade`."""

from __future__ import annotations

import base64
import re
from collections import Counter
from html.parser import HTMLParser


class Page(HTMLParser):
    """A parsed report: tags, attributes, English text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.raw, self.tags = text, Counter[str]()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.korean = 0  # open spans within a Korean text
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag == "span" and (self.korean or ("lang", "ko") in attributes):
            self.korean += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "span" and self.korean:
            self.korean -= 1

    def handle_data(self, data: str) -> None:
        if self.lasttag not in ("style", "title", "label") and not self.korean:
            self.words.append(data)

    def pictures(self, kind: str = "jpeg") -> list[bytes]:
        """Embedded images of a kind, decoded from base64."""
        start = f"data:image/{kind};base64,"
        found = [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]
        return [base64.b64decode(value[len(start) :]) for value in found if value.startswith(start)]

    def shown(self, label: str) -> int:
        """Number of images with a label."""
        return self.attributes.count(("img", "aria-labelledby", label))

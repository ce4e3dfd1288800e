"""Texts of a report that a reader of its Korean view sees, or hears from a screen reader."""

from __future__ import annotations

import re
from html.parser import HTMLParser

# Names, units and codes without a Korean word; and names of options, files and columns.
ALLOWED = re.compile(
    r"scalp( [a-z]+)?|AI Hub|META|Training|Validation|PSI|JPEG|GIF|HEIC|UTF-8|UTC|JSON|CSV|TTA|[CG]PU|top-1"
    r"|confident learning|uri,label,group|--[a-z-]+( fp32)?|findings\.parquet|[a-z]+_[a-z_]+"
)
_VOID = {"br", "img", "input", "link", "meta", "path", "rect", "circle"}
_NAMES = {"path", "name", "language"}  # names of files and models, versions, and the switch of the language
_READ = ("alt", "aria-label", "placeholder", "title")


class _KoreanView(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.window = ""
        self.ids: set[str] = set()
        self.wrong: list[str] = []  # what the texts alone do not show
        self.references: list[str] = []
        self._open: list[tuple[str, bool]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = {name: value or "" for name, value in attrs}
        skipped = bool(self._open) and self._open[-1][1]
        skipped |= tag in ("style", "script", "code") or bool(_NAMES & set(of.get("class", "").split()))
        skipped |= of.get("lang") == "en" and tag != "html"
        if tag not in _VOID:
            self._open.append((tag, skipped))
        self.ids.add(of.get("id", ""))
        if skipped:
            return
        self.texts += [of[name] for name in _READ if name in of]
        self.references += of.get("aria-labelledby", "").split()
        if tag == "img":
            if of["src"].startswith("data:image/png") and of.get("class") != "scale":
                self.wrong.append("a plot that is not SVG has texts in one language")
            if "alt" not in of:
                self.wrong.append("a picture without a text")

    def handle_endtag(self, tag: str) -> None:
        while tag not in _VOID and self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] == "title" and len(self._open) < 3:
            self.window += data
        elif not (self._open and self._open[-1][1]):
            self.texts.append(data)


def untranslated(html: str) -> list[str]:
    """Texts in the Korean view of a report that are not Korean: visible ones, those in plots and attributes.

    The title of the window cannot switch, and has both languages.
    """
    view = _KoreanView(html)
    wrong = [text.strip() for text in view.texts if re.search("[A-Za-z]{2}", ALLOWED.sub("", text))]
    if not re.search("[가-힣]", view.window):
        wrong.append(f"title: {view.window}")
    wrong += [f"no element has the id {id_}" for id_ in view.references if id_ not in view.ids]
    return wrong + view.wrong

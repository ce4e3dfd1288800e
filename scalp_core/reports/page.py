"""Render the HTML reports in English and Korean, each as one self-contained file.

Every text is on the page in both languages; two radio buttons choose by style sheet. Names of files are
untrusted, so the page escapes them, and its content security policy blocks scripts and requests as a second
defense. A report shows images: restrict access to it like theirs.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup, escape

from scalp_core.grades import GRADE_NAMES, GRADE_NAMES_KO
from scalp_core.reports.korean import KOREAN
from scalp_core.reports.words import WORDS


@dataclass(frozen=True)
class Text:
    """A text in both languages, as HTML; `str` is the English one without markup."""

    english: Markup
    korean: Markup

    def __str__(self) -> str:
        return self.english.striptags()

    @property
    def both(self) -> str:
        """Both languages in one line without markup, for places that cannot switch, as a window's title."""
        english, korean = self.english.striptags(), self.korean.striptags()
        return english if english == korean else f"{english} · {korean}"

    def __html__(self) -> Markup:
        if self.english == self.korean:
            return self.english
        return Markup('<span lang="en">{}</span><span lang="ko">{}</span>').format(self.english, self.korean)


def text(english: str, **values: Any) -> Text:
    """Text with its Korean translation from `KOREAN`.

    Args:
        english: Trusted HTML, the key of `KOREAN`, with fields of `str.format`.
        values: Values of the fields, escaped; a `Text` takes its own language.
    """
    korean = KOREAN.get(english, english)
    in_english, in_korean = (
        {
            name: getattr(value, language) if isinstance(value, Text) else value
            for name, value in values.items()
        }
        for language in ("english", "korean")
    )
    return Text(Markup(english).format(**in_english), Markup(korean).format(**in_korean))  # noqa: S704


def word(kind: str, code: Any) -> Text:
    """Words for a code of a kind in `WORDS`; the code itself if it has none."""
    words = WORDS.get(kind, {})
    return text(words[code]) if code in words else Text(escape(code), escape(code))


def join(parts: Iterable[Any], separator: str = ", ") -> Text:
    """Join texts, or strings that are equal in both languages."""
    parts, between = list(parts), Markup(separator)  # noqa: S704
    english, korean = (
        between.join(escape(getattr(part, language) if isinstance(part, Text) else part) for part in parts)
        for language in ("english", "korean")
    )
    return Text(english, korean)


def grade_texts(names: Iterable[str] = GRADE_NAMES) -> list[Text]:
    """Names of the grades with their numbers; Korean for the names of AI Hub's grades."""
    names = tuple(names)
    korean = GRADE_NAMES_KO if names == GRADE_NAMES else names
    return [
        Text(escape(f"{grade} {english}"), escape(f"{grade} {other}"))
        for grade, (english, other) in enumerate(zip(names, korean, strict=True))
    ]


def number(value: int) -> str:
    return f"{value:,}"


def percent(part: float, whole: float) -> str:
    """Percentage with one digit; a dash for a whole of 0."""
    return f"{100 * part / whole:.1f}\N{NO-BREAK SPACE}%" if whole else "–"


def most(counts: Mapping[str, int], kind: str, shown: int = 3) -> Text:
    """The first entries of counts by code, as words of a kind, and the number of the others."""
    listed = join(
        join([word(kind, code), number(count)], " ") for code, count in list(counts.items())[:shown]
    )
    return (
        text("{listed} and {more} more", listed=listed, more=len(counts) - shown)
        if len(counts) > shown
        else listed
    )


def data_uri(data: bytes, kind: str) -> str:
    """Encode a picture as a data URI for `src`; `kind` is jpeg or png."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def render(template: str, **values: Any) -> bytes:
    """Render a template of this package as HTML.

    Args:
        template: Name of the template.
        values: Values of the template.
    """
    return _environment().get_template(template).render(**values).encode()


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("scalp_core", "reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"csp_hash": _csp_hash, "in": _in_language}
    environment.globals |= {
        "t": text,
        "word": word,
        "join": join,
        "n": number,
        "percent": percent,
        "most": most,
    }
    return environment


def _in_language(text: Text, language: str) -> Markup:
    return {"en": text.english, "ko": text.korean}[language]


def _csp_hash(css: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()

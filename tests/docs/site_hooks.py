"""Hooks of mkdocs: pages of the repository's root become pages of the site, and diagrams become pictures.

Material draws Mermaid with a script from the network; the site needs none.
"""

from __future__ import annotations

import re
from itertools import count
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# Page of the site -> file in the root.
PAGES = {
    "overview.md": "README.md",
    "overview.ko.md": "README.ko.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "SECURITY.md": "SECURITY.md",
}
_LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
_DIAGRAM = re.compile(r"^```mermaid\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_TITLE = re.compile(r"^\s*accTitle: (.+)$", re.MULTILINE)


def diagrams_of_pages() -> dict[str, str]:
    """Mermaid sources of the diagrams of all pages, by the names of their pictures."""
    pages = {path.name: path for path in (ROOT / "docs").glob("*.md")}
    pages |= {name: ROOT / file for name, file in PAGES.items()}
    found = {}
    for name, path in pages.items():
        for number, source in enumerate(_DIAGRAM.findall(path.read_text()), 1):
            found[_picture(name, number)] = source
    return found


def title(source: str) -> str:
    """Title of a diagram, for those who do not see it.

    Raises:
        ValueError: It has none.
    """
    if not (found := _TITLE.search(source)):
        raise ValueError(f"a diagram has no accTitle: {source[:60]}")
    return found[1]


def _picture(page: str, number: int) -> str:
    return f"{page.removesuffix('.md')}-{number}.svg"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root."""
    for page, name in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Show diagrams as pictures. Point links to pages of the site; links to other files become text."""
    numbers = count(1)
    markdown = _DIAGRAM.sub(
        lambda found: f"![{title(found[1])}](images/{_picture(page.file.src_uri, next(numbers))})", markdown
    )
    of_root = page.file.src_uri in PAGES
    pages = {name: page for page, name in PAGES.items()}

    def rewrite(link: re.Match[str]) -> str:
        text, target = link.groups()
        if "://" in target or target.startswith("#"):
            return link[0]
        path, hash_, anchor = target.partition("#")
        in_repository = path if of_root else f"docs/{path}"
        in_repository = re.sub(r"^docs/\.\./", "", in_repository)
        if in_repository in pages:
            return f"{text}({pages[in_repository]}{hash_}{anchor})"
        if in_repository.startswith("docs/"):
            return f"{text}({in_repository.removeprefix('docs/')}{hash_}{anchor})"
        return text[1:-1]

    return re.sub(r'src="docs/', 'src="', _LINK.sub(rewrite, markdown))

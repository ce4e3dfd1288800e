"""Hooks of mkdocs: pages of the repository's root become pages of the site, and links to them stay valid."""

from __future__ import annotations

import re
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


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root."""
    for page, name in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to pages of the site; links to other files of the repository become text."""
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

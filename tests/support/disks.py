"""Small file systems that fill up soon."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a file system of `size` (`256k`) while the block runs; skip the test without permission."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here, which needs root: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        # Lazily: a process that was killed a moment ago may still hold a file.
        subprocess.run(["umount", "-l", str(folder)], check=True)

"""Print errors on the terminal: `error:` with the problem, then `hint:` with the fix."""

from __future__ import annotations

import sys


def print_error(message: str) -> None:
    """Print the message of a `UserError` on standard error."""
    print(format_error(message), file=sys.stderr)  # noqa: T201


def format_error(message: str) -> str:
    """Format the message of a `UserError` as two lines; the fix follows its first semicolon."""
    problem, _, fix = printable(message).partition("; ")
    return f"error: {problem}" + (f"\nhint:  {fix}" if fix else "")


def printable(text: str) -> str:
    """Replace control characters, which a terminal would obey, in text such as a file name."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)

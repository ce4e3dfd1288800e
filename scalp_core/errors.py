"""Errors that users see, and the error codes of images.

`UserError` ends a command with two lines; `ImageError` marks one image as failed, and the run continues.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Reasons why an image cannot be graded: `error_code` of a result row and `code` of an HTTP problem. Other
# programs read the codes, so they stay as they are.
IMAGE_CODES = {
    "empty": "the file has no bytes",
    "too_many_bytes": "the file is above the limit on bytes",
    "not_an_image": "the first bytes are not those of an image",
    "unsupported_format": "an image of an unsupported format, such as GIF or HEIC",
    "unsupported_mode": "pixels without a defined conversion to 8 bits per channel",
    "too_many_pixels": "the image is above the limit on pixels; it was not decoded",
    "too_many_scans": "a progressive JPEG with more scans than any camera writes",
    "truncated": "the file ends before the image does",
    "corrupt": "the image data are damaged",
    "not_found": "the file was listed but no longer exists",
    "outside_link": "a link out of the source, which --no-links refuses",
    "fetch_failed": "the file could not be read from storage",
    "bad_archive": "the archive cannot be read, or not to its end",
    "nested_archive": "an archive inside an archive is not read; extract it",
    "bad_name": "the file's name is not UTF-8; rename it",
    "changed": "the file has changed since it was listed or prepared",
    "crashed": "decoding the image ended its process, also in a process without other images",
    "internal_error": "reading the image raised an unexpected error, a bug of scalp; please report it",
}

IMAGE_FIXES = {
    "empty": "copy the file again",
    "too_many_bytes": "save it smaller",
    "not_an_image": "check the file",
    "unsupported_format": "save it as JPEG or PNG",
    "unsupported_mode": "save it with 8 bits per channel",
    "too_many_pixels": "save it smaller",
    "too_many_scans": "save it again, with fewer scans",
    "truncated": "copy the file again",
    "corrupt": "copy the file again",
    "not_found": "copy it back, then use `--retry-failed`",
    "outside_link": "copy the files into the source, or omit `--no-links`",
    "fetch_failed": "use `--retry-failed`; extract a damaged archive",
    "bad_archive": "fix or extract the archive, and grade it into another output directory",
    "nested_archive": "extract it, and grade it into another output directory",
    "bad_name": "rename the file, and grade it into another output directory",
    "changed": "use `--retry-failed`",
    "crashed": "save it again with another program, then use `--retry-failed`",
    "internal_error": "report the error of the row",
}
"""Fix of a failed image, by code."""


class UserError(Exception):
    """A mistake of the caller. The message is one line: the problem with the wrong input; then the fix."""


def suggest(name: str, known: Iterable[str], otherwise: str) -> str:
    """Ask whether the known name most like `name` was meant; `otherwise` if none is alike."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


class SourceError(UserError):
    """A source without the requested images or labels; it is read again after the user has fixed it."""


class ImageError(Exception):
    """An image, or an archive of images, that cannot be graded.

    Args:
        code: One of `IMAGE_CODES`.
        message: One line for a person.
    """

    def __init__(self, code: str, message: str) -> None:
        if code not in IMAGE_CODES:
            raise ValueError(f"{code} is not in IMAGE_CODES")
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return type(self), (self.code, self.message)

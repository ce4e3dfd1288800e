"""The two kinds of refusal that users see.

`UserError` ends a command with one line; `ImageError` marks one photograph as failed and never
ends anything.
"""

from __future__ import annotations

# Why a photograph cannot be graded: `error_code` of a result row, `code` of an HTTP problem (which knows no
# archives and no names). Programs read them, so none is renamed or dropped.
IMAGE_CODES = {
    "empty": "the file has no bytes",
    "too_many_bytes": "the file is above the limit on bytes",
    "not_an_image": "the bytes begin like no picture",
    "unsupported_format": "a picture of a format that is not read, such as GIF or HEIC",
    "unsupported_mode": "pixels that have no defined way to 8 bits a channel",
    "too_many_pixels": "above the limit on pixels; nothing was decompressed",
    "too_many_scans": "a progressive JPEG that asks for more passes than any camera writes",
    "truncated": "the file ends before the picture does",
    "corrupt": "the picture's data is damaged",
    "not_found": "the file was listed and is not there any more",
    "outside_link": "a link that leads out of the source, which --no-links refuses",
    "fetch_failed": "the file could not be read from where it is",
    "bad_archive": "the archive cannot be read, or not to its end",
    "nested_archive": "an archive inside an archive is not opened; take it out",
    "bad_name": "the file's name is not UTF-8, so no other program will find it",
    "changed": "the file's bytes are not those that were listed or prepared",
    "crashed": "decoding it ended the process, also when it was alone in one",
    "internal_error": "reading it raised an unexpected error, which is a bug of scalp; please report it",
}


class UserError(Exception):
    """A mistake of the caller's: the message is one line that names the input and the way out."""


class SourceError(UserError):
    """A source that does not hold what was asked for: whoever mends it wants it read anew."""


class ImageError(Exception):
    """A photograph that cannot be graded, or an archive of them.

    Args:
        code: one of `IMAGE_CODES`.
        message: one line for a person.
    """

    def __init__(self, code: str, message: str) -> None:
        if code not in IMAGE_CODES:
            raise ValueError(f"{code} is not in IMAGE_CODES")
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return type(self), (self.code, self.message)

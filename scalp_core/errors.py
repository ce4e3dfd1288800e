"""The two kinds of refusal that users see.

`UserError` ends a command with one line; `ImageError` marks one photograph as failed and never
ends anything.
"""


class UserError(Exception):
    """A mistake of the caller's: the message is one line that names the input and the way out."""


class ImageError(Exception):
    """A photograph that cannot be graded.

    Args:
        code: stable identifier, the same in result rows (`error_code`) and in HTTP problems.
        message: one line for a person.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return type(self), (self.code, self.message)

"""Group images by folder or name pattern, for sources without AI Hub's names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from scalp_core.datasets.aihub import Folders, read_folders
from scalp_core.errors import UserError

_WAYS = "folder or regex:PATTERN, such as 'regex:(patient\\d+)_'"


@dataclass(frozen=True)
class GroupBy:
    """The property that images of one group share.

    Args:
        text: `folder`: the folders above an image that do not name a grade, a symptom or a delivered part;
            `regex:PATTERN`: the groups of the pattern, or its whole match, in the path below the source.

    Raises:
        UserError: the text is not one of these.
    """

    text: str

    def __post_init__(self) -> None:
        if self.text == "folder":
            return
        if not self.text.startswith("regex:"):
            raise UserError(f"--group-by {self.text} is unknown; give {_WAYS}")
        try:
            matches_nothing = self._pattern.match("")
        except re.error as error:
            raise UserError(
                f"--group-by {self.text} is not a regular expression ({error}); give {_WAYS}"
            ) from None
        if matches_nothing:
            raise UserError(f"--group-by {self.text} matches every name; give {_WAYS}")

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(self.text.removeprefix("regex:"))

    def group_of(self, path: str) -> str | None:
        """Return the group of one image, or None, by its path below the source; an archive is a folder."""
        if self.text == "folder":
            return _folder_group(path)
        match = self._pattern.search(path)
        if not match:
            return None
        groups = [group for group in match.groups() if group is not None]
        return "/".join(groups) if self._pattern.groups else match[0]


def _folder_group(path: str) -> str | None:
    names = path.split("/")[:-1]
    return "/".join(name for name in names if read_folders(name) == Folders()) or None

"""Parse settings from `key=value` words and YAML; an unknown key is refused with the nearest known one."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from scalp_core import storage
from scalp_core.errors import UserError

Settings = TypeVar("Settings", bound=BaseModel)

OLD_SPELLINGS = {
    "colour_cast": "color_cast",
    "colour_jitter": "color_jitter",
    "optimiser": "optimizer",
}
"""Present name of each renamed key; users' commands, files and earlier results keep their old spelling."""


def rename_old_keys(values: Any) -> Any:
    """Replace the old spellings of keys in a dictionary; return anything else as it is.

    `parse_overrides` and `load_yaml` call it. A model that is also read from stored JSON adds it:
    `_old_keys = model_validator(mode="before")(rename_old_keys)`.
    """
    if not isinstance(values, dict):
        return values
    return {OLD_SPELLINGS.get(key, key): value for key, value in values.items()}


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """Parse words such as `["epochs=3", "augment=false"]` into values of their YAML types.

    Raises:
        UserError: a word without an equals sign.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--set {word} has no value; write --set key=value, for example --set epochs=5")
        # YAML 1.1 reads 2e-4 as a string; pydantic converts it where the field is a number.
        values[key.strip()] = yaml.safe_load(value)
    return rename_old_keys(values)


def load_yaml(kind: str, name_or_path: str, folder: Path) -> tuple[dict[str, Any], str]:
    """Read a YAML file; return its values by key, and its path or uri for messages.

    Args:
        kind: Word for such a file in messages, such as "recipe".
        name_or_path: Name of a file in `folder`, or a `.yaml` file, local or `s3://`.
        folder: Folder of the files that ship with scalp.

    Raises:
        UserError: a missing file, invalid YAML, or YAML other than `key: value` lines.
    """
    if storage.is_s3(name_or_path):
        text, origin = storage.read(name_or_path).decode(), name_or_path
    else:
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            path = folder / f"{name_or_path}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
            raise UserError(f"no {kind} {name_or_path!r}; give one of {known}, or the path of a .yaml file")
        text, origin = path.read_text(), str(path)
    try:
        values: Any = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{origin} is not a list of settings; write lines of the form key: value")
    return rename_old_keys(values), origin


def parse_settings(kind: type[Settings], values: dict[str, Any], origin: str) -> Settings:
    """Validate values with their pydantic model.

    Args:
        kind: Pydantic model of the settings.
        values: Values by field name.
        origin: Their file or option, for the message.

    Raises:
        UserError: the first invalid key or value; the message starts with `origin`.
    """
    known = list(kind.model_fields)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            every = ", ".join(known)
            raise UserError(f"{origin}: unknown key {key!r}; did you mean {near!r}? All keys: {every}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        # pydantic prefixes the messages of scalp's own validators.
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(": ".join(filter(None, (origin, where, message)))) from None

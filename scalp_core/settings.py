"""Parse settings from `key=value` words and YAML; an unknown key is refused with the nearest known one."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from scalp_core import storage
from scalp_core.errors import UserError, suggest

Settings = TypeVar("Settings", bound=BaseModel)

_FEW_KEYS = 10
_REFERENCE = "docs/settings.md lists all keys"

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


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Parse words such as `["epochs=3", "augment=false"]` into values of their YAML types.

    Raises:
        UserError: a word without an equals sign, or whose value is not valid YAML.
    """
    values: dict[str, Any] = {}
    for word in words:
        _, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--set {word} has no value; write --set key=value, for example --set epochs=5")
        try:
            # YAML 1.1 reads 2e-4 as a string; pydantic converts it where the field is a number.
            values[_key_of(word)] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(
                f"--set {word} is not valid YAML ({getattr(error, 'problem', error)}); close brackets and "
                "quotes, or put the value in quotes"
            ) from error
    return values


def _key_of(word: str) -> str:
    """Present name of the key of a word `key=value`."""
    key = word.partition("=")[0].strip()
    return OLD_SPELLINGS.get(key, key)


def load_yaml(kind: str, name_or_path: str, folder: Path | None = None) -> tuple[dict[str, Any], str]:
    """Read a YAML file; return its values by key, and its path or uri for messages.

    Args:
        kind: Word for such a file in messages, such as "recipe".
        name_or_path: Name of a file in `folder`, or a `.yaml` file, local or `s3://`.
        folder: Folder of the files that ship with scalp; None if there are none.

    Raises:
        UserError: a missing file, invalid YAML, or YAML other than `key: value` lines.
    """
    if storage.is_s3(name_or_path):
        origin = name_or_path
    else:
        path = Path(name_or_path)
        if folder and path.suffix not in (".yaml", ".yml"):
            path = folder / f"{name_or_path}.yaml"
        if folder and not path.is_file():
            known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
            raise UserError(f"no {kind} {name_or_path!r}; give one of {known}, or the path of a .yaml file")
        origin = str(path)
    try:
        values: Any = yaml.safe_load(storage.read(origin)) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{origin} is not a list of settings; write lines of the form key: value")
    return rename_old_keys(values), origin


def parse_settings(
    kind: type[Settings], values: dict[str, Any], origin: str, overrides: Sequence[str] = ()
) -> Settings:
    """Validate values with their pydantic model.

    Args:
        kind: Pydantic model of the settings.
        values: Values by field name.
        origin: Their file or option, for the message.
        overrides: Words `key=value` of the option `--set`, which replace values.

    Raises:
        UserError: the first invalid key or value; the message starts with its `--set`, or with `origin`.
    """
    values = values | parse_overrides(overrides)
    words = {_key_of(word): word for word in overrides}
    known = list(kind.model_fields)
    for key in values:
        if key not in known:
            few = len(known) <= _FEW_KEYS
            fix = suggest(str(key), known, f"use one of {', '.join(known)}" if few else _REFERENCE)
            place = f"--set {words[key]}" if key in words else origin
            raise UserError(f"{place}: unknown key {key!r}; {fix}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first: Any = error.errors()[0]
        raise UserError(_explain(first, origin, words)) from None


def _explain(error: Any, origin: str, words: dict[str, str]) -> str:
    """Explain an error of pydantic: where the value is from, the value, and what it must be.

    Args:
        error: Dictionary of pydantic, with `type, loc, msg, input`.
        origin: File or option of the values.
        words: Words of `--set` by key.
    """
    where = ".".join(map(str, error["loc"]))
    message: str = error["msg"].removeprefix("Value error, ")  # of scalp's own validators
    # A validator of the whole model names the keys that contradict each other.
    keys = error["loc"][:1] or [key for key in words if re.search(rf"\b{re.escape(key)}\b", message)]
    given = [f"--set {words[key]}" for key in keys if key in words]
    place = " ".join(given) or ": ".join(filter(None, (origin, where)))
    match error["type"]:
        case "value_error":
            return f"{place}: {message}"
        case "extra_forbidden":
            return f"{place}: unknown key; {_REFERENCE}"
        case "missing":
            return f"{place} is missing; add it"
    value = "" if given else f": {reprlib.repr(error['input'])}"
    rule = re.sub(r"^\w+ should ", "must ", message.partition(", unable to")[0])
    return f"{place}{value} is invalid; {where} {rule}"

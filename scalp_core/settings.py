"""Typed settings from `key=value` words and YAML; what is unknown is refused with the nearest known key."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from scalp_core import storage
from scalp_core.errors import UserError

Settings = TypeVar("Settings", bound=BaseModel)


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """`["epochs=3", "augment=false"]` as values of their YAML types.

    Raises:
        UserError: a word has no equals sign.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--set {word}: write --set key=value, for example --set epochs=5")
        # YAML 1.1 reads 2e-4 as a word; pydantic makes numbers of words where numbers are wanted.
        values[key.strip()] = yaml.safe_load(value)
    return values


def load_yaml(kind: str, name_or_path: str, folder: Path) -> tuple[dict[str, Any], str]:
    """The keys and values of a YAML file, and where they come from.

    Args:
        kind: what it is called in messages.
        name_or_path: of one in `folder`, or a `.yaml` file, local or `s3://`.
        folder: of those that are shipped.

    Raises:
        UserError: there is no such file, or it holds something else.
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
        raise UserError(f"{origin} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{origin} must hold lines of the form key: value")
    return values, origin


def parse_settings(kind: type[Settings], values: dict[str, Any], origin: str) -> Settings:
    """Checks values against their declaration.

    Args:
        kind: the pydantic model.
        values: by field name.
        origin: where they come from, for the message.

    Raises:
        UserError: names the first thing wrong, and `origin`.
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
        # What a check of ours says stands for itself; pydantic puts the kind of error before it.
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(": ".join(filter(None, (origin, where, message)))) from None

"""Ray's private parts: each part that scalp depends on exists, and one module imports them."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from contextlib import suppress
from pathlib import Path

import pytest
import ray

from cluster import haproxy, ray_internals

ROOT = Path(__file__).parents[2]
RAY = Path(ray.__file__).parent
PRIVATE = re.compile(r"\bray(\.\w+)*\.(_[a-z]\w*|core\.generated|serve\.generated)\b")


def is_assigned(owner: object, name: str) -> bool:
    """Whether a class or one of its bases assigns `self.NAME`."""
    for each in owner.__mro__[:-1] if isinstance(owner, type) else ():
        with suppress(OSError):  # a class of the C++ core has no source
            if re.search(rf"\bself\.{name}\b.*=", inspect.getsource(each)):
                return True
    return False


@pytest.mark.parametrize("path", ray_internals.DEPENDENCIES)
def test_ray_has(path):
    module, _, attributes = path.partition(":")
    owner = importlib.import_module(module)
    for name in filter(None, attributes.split(".")):
        if not hasattr(owner, name) and is_assigned(owner, name):
            return
        assert hasattr(owner, name), (
            f"Ray {ray.__version__} has no {path}: {ray_internals.DEPENDENCIES[path]}"
        )
        owner = getattr(owner, name)


@pytest.mark.parametrize("name", ray_internals.VARIABLES)
def test_ray_reads_the_variable(name):
    file = ray_internals.VARIABLES[name]
    stored = name if name.isupper() else name.removeprefix("RAY_")
    assert stored.encode() in (RAY / file).read_bytes(), (
        f"Ray {ray.__version__} does not read {name} in {file}"
    )


def test_ray_reads_the_variables_of_haproxy(tmp_path):
    constants = (RAY / "serve/_private/constants.py").read_text()
    names = haproxy.environment(tmp_path).keys() - {haproxy.POLICY_VARIABLE}
    assert {name for name in names if name not in constants} == set()


def test_every_variable_of_ray_internals_is_listed(monkeypatch):
    environment: dict[str, str] = {}
    with monkeypatch.context() as patch:
        patch.setattr(ray_internals.os, "environ", environment)
        ray_internals.set_local_defaults(cores=2, logical_cpus=6, verbose=False, joins=False)
    environment |= ray_internals.simulated_environment("head") | ray_internals.TUNE_ENVIRONMENT
    documented = {"RAY_USAGE_STATS_ENABLED", "RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}
    assert environment.keys() - documented == ray_internals.VARIABLES.keys()


def test_every_private_import_of_ray_internals_is_listed():
    tree = ast.parse(Path(ray_internals.__file__).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ray."):
            for alias in node.names:
                prefixes = (f"{node.module}:{alias.name}", f"{node.module}.{alias.name}:")
                assert any(path.startswith(prefixes) for path in ray_internals.DEPENDENCIES), alias.name


@pytest.mark.parametrize("package", ["cluster", "jobs", "scalp_core", "serving"])
def test_no_other_module_reaches_into_ray(package):
    own = Path(ray_internals.__file__)
    found = {
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in (ROOT / package).rglob("*.py")
        if path != own
        for match in PRIVATE.finditer(path.read_text())
    }
    assert found == set()

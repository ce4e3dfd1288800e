"""`cluster/Containerfile`, as far as it can be checked without building it."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import ray
import yaml
from ray._private import ray_constants

from cluster.image import IMAGE, UID
from cluster.local import SLEEPING_THREADS
from serving.connections import CALLBACK

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster" / "Containerfile").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()
LINES = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()
STEPS = [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1].strip()) for line in LINES if line.strip()]
ENVIRONMENT = dict(word.split("=", 1) for name, rest in STEPS if name == "ENV" for word in shlex.split(rest))


def steps(name):
    return [rest for each, rest in STEPS if each == name]


def first(text):
    return next(index for index, step in enumerate(STEPS) if text in " ".join(step))


def test_the_python_is_the_one_that_the_lock_is_made_for():
    (base,) = steps("FROM")
    (locked,) = re.findall(r"--python-version ([\d.]+)", (ROOT / "Makefile").read_text())
    assert base.startswith(f"python:{locked}-slim")


def test_everything_is_installed_from_the_lock_with_its_hashes_and_nothing_is_compiled():
    lock, project = (rest for rest in steps("RUN") if "pip install" in rest)
    for option in (
        "--require-hashes",
        "--no-deps",
        "--only-binary :all:",
        "--no-cache-dir",
        "-r /tmp/requirements.lock",
    ):
        assert option in lock
    for option in ("--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir"):
        assert option in project
    (needed,) = re.findall(r'requires = \["setuptools>=(\d+)"\]', PYPROJECT)
    (locked,) = re.findall(r"^setuptools==(\d+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert int(locked) >= int(needed)  # it builds the project, as nothing else is fetched


def test_a_change_of_code_does_not_install_torch_again():
    assert first("COPY requirements.lock") < first("--require-hashes") < first("COPY pyproject.toml")
    assert not any("COPY . " in f"COPY {rest}" for rest in steps("COPY"))


def test_what_is_copied_exists_is_let_in_and_is_all_that_the_project_needs():
    copied = {source for rest in steps("COPY") for source in rest.split()[:-1]}
    ignore = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert ignore[0] == "*"
    assert copied == {line[1:] for line in ignore if line.startswith("!")}
    assert all((ROOT / source).exists() for source in copied)
    (packages,) = re.findall(r"include = (\[.*\])", PYPROJECT)
    assert {each.rstrip("*") for each in yaml.safe_load(packages)} < copied
    assert {"pyproject.toml", "README.md", "LICENSE"} < copied


def test_the_project_builds_from_what_is_copied(tmp_path):
    for rest in steps("COPY"):
        *sources, to = rest.split()
        for source in sources:
            there = tmp_path / "context" / to.lstrip("/")
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, there, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                there.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, there)
    command = next(shlex.split(rest) for rest in steps("RUN") if "--no-index" in rest)
    options, place, out = command[1:-1], command[-1], tmp_path / "out"
    project = tmp_path / "context" / place.lstrip("/")
    subprocess.run(
        [sys.executable, "-m", "pip", *options, "--target", str(out), str(project)],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    for file in ("bin/scalp", "bin/scalp-haproxy", "jobs/recipes/default.yaml", "serving/web"):
        assert (out / file).exists(), file


def test_it_runs_as_a_user_who_is_not_root():
    *_, (name, user), _ = STEPS
    assert (name, user) == ("USER", f"{UID}:{UID}")
    assert UID >= 1000
    assert any(f"useradd --uid {UID}" in rest for rest in steps("RUN"))


def test_the_image_has_one_name():
    assert f"-t {IMAGE} ." in TEXT
    assert f'version = "{IMAGE.removeprefix("scalp:")}"' in PYPROJECT


def test_what_serving_needs_is_in_the_environment_and_ray_knows_every_name():
    assert ENVIRONMENT["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == CALLBACK
    program = Path(ENVIRONMENT["RAY_SERVE_HAPROXY_BINARY_PATH"])
    assert program.parent == Path("/usr/local/bin")  # where pip puts scripts in this base
    assert f'{program.name} = "cluster.haproxy:main"' in PYPROJECT
    assert ENVIRONMENT["RAY_SERVE_ENABLE_HA_PROXY"] == ENVIRONMENT["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    assert ENVIRONMENT["RAY_USAGE_STATS_ENABLED"] == "0"
    assert ENVIRONMENT[ray_constants.RAY_WORKER_NICENESS] == "0"
    assert SLEEPING_THREADS in ENVIRONMENT.items()
    package = Path(ray.__file__).parent
    known = "".join(
        (package / file).read_text()
        for file in (
            "serve/_private/constants.py",
            "_private/ray_constants.py",
            "_common/usage/usage_constants.py",
        )
    )
    for name in ENVIRONMENT:
        assert name in known or name in ("PATH", "LD_LIBRARY_PATH", SLEEPING_THREADS[0])

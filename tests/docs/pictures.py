"""Draw the pictures of README and docs: `make pictures`; `make docs` draws the charts alone.

The charts come from the newest kept results in docs/results. Diagrams are Mermaid in the pages, which
GitHub shows; Chromium draws them for the site, which loads nothing from the network. The pictures of the
page are taken in Chromium, from an endpoint that serves the model of `make demo`, or of another run:
`python -m tests.docs.pictures RUN DATA`. `docs/images/sources.json` records from what each picture
was made; a test compares it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure
from PIL import Image

from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets import manifest
from scalp_core.grades import GRADE_NAMES
from scalp_core.results.schema import RESULTS_FOLDER
from tests.docs.results import describe_machine
from tests.docs.site_hooks import diagrams_of_pages
from tests.support import result_rows
from tests.support.ports import free_port
from tests.support.reviewing import referred_row, scalp_review

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs/images"
RESULTS = ROOT / "docs/results"
SOURCES = IMAGES / "sources.json"
DEMO = ROOT / "runs/demo"
_WEB = ("*.html", "*.js", "*.css")
# Pictures, the folders of what they show, and its files there.
PAGES = {
    "page-en.png": (("serving/web",), _WEB),
    "page-ko.png": (("serving/web",), _WEB),
    "review-en.png": (("serving/web",), _WEB),
    "review-view-en.jpg": (("serving/web",), _WEB),
    "report-en.png": (("scalp_core/reports",), _WEB),
    "report-queue-en.jpg": (("scalp_core/reports",), _WEB),
    "grades.jpg": (("scalp_core/synthetic",), ("*.py",)),
}
# Their sizes suit wider fonts than those of most readers, so that no text is cut.
_DIAGRAM_STYLE = {
    "startOnLoad": False,
    "theme": "base",
    "fontFamily": "Helvetica, Arial, sans-serif",
    "flowchart": {"wrappingWidth": 420, "useMaxWidth": False},
    "themeVariables": {
        "primaryColor": "#eef4ff",
        "primaryBorderColor": "#1f6feb",
        "primaryTextColor": "#1f2328",
        "lineColor": "#7d8590",
        "clusterBkg": "#f6f8fa",
        "clusterBorder": "#d0d7de",
    },
}
_DRAW_DIAGRAM = """async ({style, source}) => {
    mermaid.initialize(style);
    const holder = document.createElement("div");
    holder.innerHTML = (await mermaid.render("diagram", source)).svg;
    return new XMLSerializer().serializeToString(holder.firstChild);
}"""
MAX_BYTES = 400_000  # per picture: the repository keeps each version
_STYLE = ["default", {"svg.fonttype": "none", "svg.hashsalt": "scalp"}]
_SCALP, _OTHER = "#1f6feb", "#8b949e"


def newest(kind: str, has: str) -> Path:
    """Newest kept result of `kind` with a row of the way `has`."""
    paths = RESULTS.glob(f"{kind}-*.json")
    found = [
        path for path in paths if any(row["what"] == has for row in json.loads(path.read_text())["rows"])
    ]
    return max(found, key=lambda path: json.loads(path.read_text())["date"])


def draw_bulk(path: Path, to: Path) -> None:
    """Draw the images per second of whole runs, from a local folder, start and end included."""
    result = json.loads(path.read_text())
    images = result["settings"]["photographs"]
    rates = {
        row["what"]: images / row["whole_seconds"]
        for row in result["rows"]
        if row["source"] == "local" and row["what"] != "engine alone"
    }
    title = f"Bulk grading: images per second, whole run of {images:,} images"
    _draw_bars(rates, title, _machine(result), to)


def draw_serving(path: Path, to: Path, clients: int) -> None:
    """Draw the answers per second at `clients` clients."""
    result = json.loads(path.read_text())
    rates = {
        row["what"]: row["requests_per_second"]
        for row in result["rows"]
        if row["load"] == "closed" and row.get("clients") == clients
    }
    _draw_bars(rates, f"Endpoint: answers per second, {clients} clients", _machine(result), to)


def draw_transfer(path: Path, to: Path) -> None:
    """Draw the kappa over the number of training images, from ImageNet weights and from random ones."""
    result = json.loads(path.read_text())
    figure = Figure(figsize=(7.2, 3.4))
    axes = figure.subplots()
    for weights, label, color in (
        ("offline", "ImageNet weights", _SCALP), ("none", "random weights", _OTHER),
    ):  # fmt: skip
        rows = [row for row in result["rows"] if row["weights"] == weights]
        kappas = [row["qwk"] for row in rows]
        ends = [[abs(row["qwk_interval"][end] - row["qwk"]) for row in rows] for end in (0, 1)]
        counts = [row["images"] for row in rows]
        axes.errorbar(counts, kappas, yerr=ends, color=color, marker="o", capsize=4)
        axes.annotate(label, (counts[-1], kappas[-1]), (8, 0), textcoords="offset points", va="center")
    axes.set_xscale("log")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.set_xlim(counts[0] * 0.85, counts[-1] * 2.1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("training images")
    axes.set_ylabel("quadratic weighted kappa")
    axes.spines[["top", "right"]].set_visible(False)
    title = f"Test on other microscopes after {result['settings']['steps']} steps"
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    note = f"Synthetic images, {result['date'][:10]}. Bars: 95 % intervals over microscopes."
    figure.text(0.01, 0.01, note, fontsize=8, color="#57606a")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(to, format="svg", metadata={"Date": None}, facecolor="white")


def _machine(result: dict) -> str:
    return f"{describe_machine(result)}, {result['date'][:10]}. Longer is better."


def _draw_bars(rates: dict[str, float], title: str, note: str, to: Path) -> None:
    """Draw one horizontal bar per way, fastest first."""
    names = sorted(rates, key=rates.__getitem__)
    figure = Figure(figsize=(7.2, 0.36 * len(names) + 0.9))
    axes = figure.subplots()
    colors = [_SCALP if name.startswith("scalp") else _OTHER for name in names]
    labels = [name.replace("our engine", "scalp's engine") for name in names]
    bars = axes.barh(labels, [rates[name] for name in names], color=colors, height=0.66)
    axes.bar_label(bars, fmt="%.1f", padding=4)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.12)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    figure.text(0.01, 0.01, note, fontsize=8, color="#57606a")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(to, format="svg", metadata={"Date": None}, facecolor="white")


def hash_sources(folders: tuple[str, ...], patterns: tuple[str, ...]) -> str:
    """SHA-256 of the files that a picture shows."""
    paths = [
        path for folder in folders for pattern in patterns for path in sorted((ROOT / folder).rglob(pattern))
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def hash_diagram(source: str) -> str:
    """SHA-256 of a diagram and of what all diagrams share."""
    return hashlib.sha256(json.dumps([source, _DIAGRAM_STYLE]).encode()).hexdigest()


def charts() -> dict[str, tuple[str, Path]]:
    """Charts: file name, kind of benchmark, result that it draws."""
    return {
        "bulk.svg": ("bulk", newest("bulk", "plain PyTorch fp32")),
        "serve.svg": ("serve", newest("serve", "scalp serve")),
        "transfer.svg": ("transfer", max(RESULTS.glob("transfer-*.json"))),
    }


@style.context(_STYLE)
def draw(name: str, kind: str, path: Path, folder: Path) -> None:
    """Draw the chart `name` into `folder`, in the same style whatever else was drawn before."""
    match kind:
        case "bulk":
            draw_bulk(path, folder / name)
        case "transfer":
            draw_transfer(path, folder / name)
        case _:
            draw_serving(path, folder / name, clients=8)


@contextmanager
def _served(bundle: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "jobs.cli", "serve", str(bundle), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as server:
        try:
            line = server.stdout.readline()
            if not line.startswith("READY"):
                raise SystemExit(f"error: the endpoint did not start: {line}")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def _one_per_grade(data: Path) -> list[Path]:
    """First image of each grade in the test split, the mildest first."""
    rows = manifest.select_split(manifest.read_manifest(str(data)), "test").to_pylist()
    first = {row["label"]: Path(row["uri"]) for row in reversed(rows)}
    return [first[grade] for grade in sorted(first)]


def _some_of_test(data: Path, count: int) -> list[Path]:
    """Images of the test split, evenly spaced."""
    uris = manifest.select_split(manifest.read_manifest(str(data)), "test")["uri"].to_pylist()
    return [Path(uri) for uri in uris[:: max(1, len(uris) // count)]][:count]


@contextmanager
def _browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


def draw_diagrams() -> dict[str, str]:
    """Draw the diagrams of the pages; return the SHA-256 of each source by the name of its picture."""
    sources = diagrams_of_pages()
    with _browser() as browser:
        page = browser.new_page()
        page.add_script_tag(path=str(resources.files("mermaidx") / "assets/mermaid.js"))
        for name, source in sources.items():
            svg = page.evaluate(_DRAW_DIAGRAM, {"style": _DIAGRAM_STYLE, "source": source})
            (IMAGES / name).write_text(svg + "\n")
    return {name: hash_diagram(source) for name, source in sources.items()}


def take_page_pictures(bundle: Path, images: list[Path]) -> None:
    """Take pictures of the page in English and Korean, with a heatmap of the last of `images`."""
    from playwright.sync_api import expect

    with _served(bundle) as origin, _browser() as browser:
        for locale, name in (("en-US", "page-en.png"), ("ko-KR", "page-ko.png")):
            page = browser.new_page(viewport={"width": 1200, "height": 860}, locale=locale)
            page.goto(origin)
            page.set_input_files("#file", [str(image) for image in images])
            expect(page.locator("#progress")).to_be_hidden(timeout=120_000)
            page.locator(".tile").last.click()
            page.locator("#heat-show").check()
            expect(page.locator("#heat")).to_be_visible(timeout=60_000)
            page.screenshot(path=IMAGES / name, full_page=True)


def take_review_picture(image: Path) -> None:
    """Take a picture of the review of `image`, whose result row is handmade."""
    from playwright.sync_api import expect

    data = image.read_bytes()
    with tempfile.TemporaryDirectory() as folder, _browser() as browser:
        result_rows.write(f"{folder}/graded/{RESULTS_FOLDER}", [referred_row(str(image), data)], files=1)
        with scalp_review(f"{folder}/graded", f"{folder}/labels", "--reader", "kim") as review:
            page = browser.new_page(viewport={"width": 1000, "height": 640}, locale="en-US")
            page.goto(review.url)
            expect(page.locator(".answer").first).to_have_attribute("aria-disabled", "false")
            page.screenshot(path=IMAGES / "review-en.png", full_page=True)


def take_review_view_picture(bundle: Path, data: Path, image: Path) -> None:
    """Take a picture of the review of `image` with the heatmap and the similar training images."""
    from playwright.sync_api import expect

    version = load_bundle(str(bundle)).spec.model_version
    row = referred_row(str(image), image.read_bytes(), grade=1, model_version=version)
    with tempfile.TemporaryDirectory() as folder, _browser() as browser:
        result_rows.write(f"{folder}/graded/{RESULTS_FOLDER}", [row], files=1)
        words = ("--reader", "kim", "--bundle", str(bundle), "--neighbors", str(data))
        with scalp_review(f"{folder}/graded", f"{folder}/labels", *words) as review:
            page = browser.new_page(viewport={"width": 1000, "height": 640}, locale="en-US")
            page.goto(review.url)
            expect(page.locator(".answer").first).to_have_attribute("aria-disabled", "false")
            page.keyboard.press("h")
            page.keyboard.press("s")
            expect(page.locator("#heat")).to_be_visible()
            for neighbor in page.locator("#neighbors-list img").all():
                expect(neighbor).not_to_have_js_property("naturalWidth", 0)
            page.screenshot(path=IMAGES / "review-view-en.jpg", full_page=True, quality=85)


def take_report_pictures(bundle: Path, images: list[Path]) -> None:
    """Grade `images` and a broken file, and take pictures of the report's top and review queue."""
    with tempfile.TemporaryDirectory() as folder, _browser() as browser:
        source = Path(folder, "images")
        source.mkdir()
        for image in images:
            shutil.copy(image, source)
        Path(source, "broken.jpg").write_bytes(images[0].read_bytes()[:5000])
        command = [sys.executable, "-m", "jobs.cli", "grade", str(bundle), "images", "graded"]
        subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
        page = browser.new_page(viewport={"width": 1000, "height": 800})
        page.goto(f"file://{folder}/graded/report.html")
        # Without the paths of this machine, which stand above the warnings and below each card.
        top = page.locator(".warn").first.bounding_box()["y"] - 16
        clip = {"x": 0, "y": top, "width": 1000, "height": 680}
        page.screenshot(path=IMAGES / "report-en.png", clip=clip, full_page=True)
        clip = page.locator(".cards").first.bounding_box()
        clip["height"] = page.locator(".card .path").first.bounding_box()["y"] - clip["y"]
        page.screenshot(path=IMAGES / "report-queue-en.jpg", clip=clip, full_page=True, quality=85)


def draw_grades(images: list[Path]) -> None:
    """Draw one image per grade in a row, with the names of the grades."""
    figure = Figure(figsize=(10, 2.15))
    for grade, (axes, image) in enumerate(zip(figure.subplots(1, len(images)), images, strict=True)):
        axes.imshow(Image.open(image))
        axes.set_title(f"{grade} {GRADE_NAMES[grade]}", fontsize=11)
        axes.axis("off")
    figure.tight_layout()
    figure.savefig(IMAGES / "grades.jpg", dpi=110, facecolor="white", pil_kwargs={"quality": 85})


def draw_charts() -> None:
    """Draw the charts, and record their sources."""
    sources = json.loads(SOURCES.read_text())
    for name, (kind, path) in charts().items():
        draw(name, kind, path, IMAGES)
        sources[name] = path.name
    SOURCES.write_text(json.dumps(sources, indent=1) + "\n")


def main() -> None:
    """Draw all pictures and record their sources."""
    draw_charts()
    sources = json.loads(SOURCES.read_text()) | draw_diagrams()
    SOURCES.write_text(json.dumps(sources, indent=1) + "\n")
    run, data = (Path(argument) for argument in sys.argv[1:3] or (DEMO / "run", DEMO / "data"))
    if not (run / "bundle").is_dir():
        raise SystemExit(
            f"error: {run} has no bundle\nhint:  run `make demo` first, or name a run and its data"
        )
    images = _one_per_grade(data)
    draw_grades(images)
    take_page_pictures(run, images)
    take_review_picture(images[-1])
    take_review_view_picture(run, data, images[1])
    take_report_pictures(run, _some_of_test(data, 60))
    sources |= {name: hash_sources(*shown) for name, shown in PAGES.items()}
    SOURCES.write_text(json.dumps(sources, indent=1) + "\n")
    for path in IMAGES.glob("*.png"):
        with Image.open(path) as picture:
            picture.save(path, optimize=True)
    for path in IMAGES.glob("*.*g"):
        if (size := path.stat().st_size) > MAX_BYTES:
            raise SystemExit(f"error: {path.name} has {size:,} bytes, more than {MAX_BYTES:,}")


if __name__ == "__main__":
    main()

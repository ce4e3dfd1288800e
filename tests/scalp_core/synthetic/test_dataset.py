import json
import re
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scalp_core.errors import UserError
from scalp_core.grades import GRADE_NAMES_KO
from scalp_core.synthetic import scene
from scalp_core.synthetic.dataset import SynthSummary, write_dataset, write_image
from scalp_core.synthetic.plan import SynthOptions, plan_dataset
from scalp_core.synthetic.profiles import DeviceProfile
from scalp_core.synthetic.scene import flake_coverage, render_image
from scalp_core.synthetic.severity import PAPER_COUNTS
from tests.support.sources import audited, folder_of

pytestmark = pytest.mark.medium

NAME = re.compile(r"^\d{4}_A2LEBJJDE\d{5}O_\d{13}_(2_TH|3_TH|4_LH|5_RH|6_BH)\.jpg$")
FOLDERS = [f"미세각질_{grade}.{name}" for grade, name in enumerate(GRADE_NAMES_KO)]
OPTIONS = SynthOptions(images=32, seed=3)
# Enough for cross-validation across devices.
MANY = SynthOptions(images=220, seed=3)


def kappa(a, b) -> float:
    return float(cohen_kappa_score(a, b, weights="quadratic"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def small(**changes) -> SynthOptions:
    return SynthOptions(**({"images": 20, "seed": 7, "devices": 3} | changes))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> tuple[Path, SynthSummary]:
    out = tmp_path_factory.mktemp("synth") / "set"
    return out, write_dataset(out, OPTIONS, workers=1)


# --- plan --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_plan():
    return plan_dataset(SynthOptions(images=12_739))


def test_shares_of_grades_are_the_papers(large_plan):
    for grades in ([plan.grade for plan in large_plan], [plan.true_grade for plan in large_plan]):
        assert np.bincount(grades) == pytest.approx(PAPER_COUNTS, abs=5)


def test_best_possible_grader_reaches_about_0_94(large_plan):
    assert 0.93 <= kappa([p.grade for p in large_plan], [p.true_grade for p in large_plan]) <= 0.95


def test_without_label_noise_the_label_is_the_truth():
    plans = plan_dataset(SynthOptions(images=500, label_noise=0))
    assert all(plan.grade == plan.true_grade == np.clip(round(plan.severity), 0, 3) for plan in plans)


def test_parts_are_7_to_2_and_share_people(large_plan):
    counts = Counter(plan.part for plan in large_plan)
    assert counts["Training"] / counts["Validation"] == pytest.approx(3.5, rel=0.001)
    people = {part: {p.stem.rsplit("_", 2)[0] for p in large_plan if p.part == part} for part in counts}
    assert people["Training"] & people["Validation"]  # the real set leaks so, and readers must cope


def test_every_person_has_several_photographs_by_one_device_in_one_session(large_plan):
    people = defaultdict(list)
    for plan in large_plan:
        people[plan.stem.split("_")[2]].append(plan)
    assert {len(plans) for plans in people.values()} == {3, 4, 5}
    for plans in people.values():
        assert len({plan.stem.rsplit("_", 2)[0] for plan in plans}) == 1
        own = [{k: v for k, v in plan.meta.items() if k != "location"} for plan in plans]
        assert all(meta == own[0] for meta in own)
    between = np.std([np.mean([p.severity for p in plans]) for plans in people.values()])
    within = np.mean([np.std([p.severity for p in plans]) for plans in people.values()])
    assert between > 1.5 * within > 0.1


def test_names_are_unique_and_in_the_time_of_the_collection(large_plan):
    assert len({plan.stem for plan in large_plan}) == len(large_plan)
    korea = timedelta(hours=9)
    for plan in large_plan[::50]:
        taken = datetime.fromtimestamp(int(plan.stem.split("_")[2]) / 1000, UTC) + korea
        assert (2020, 10, 13) <= (taken.year, taken.month, taken.day) <= (2020, 11, 30)
        assert 10 <= taken.hour < 19


def test_sebum_and_scale_near_exclude_each_other(large_plan):
    oily = {
        grade: np.mean([plan.symptoms[1] > 0 for plan in large_plan if plan.grade == grade])
        for grade in (1, 2, 3)
    }
    assert oily[1] > 2 * oily[2] > 4 * oily[3] > 0
    assert all(plan.symptoms == (0,) * 6 for plan in large_plan if plan.grade == 0)


@pytest.mark.parametrize("images", [1, 2, 5, 6, 7, 64, 333])
def test_any_number_of_photographs_is_met(images):
    plans = plan_dataset(SynthOptions(images=images))
    assert [plan.index for plan in plans] == list(range(images))


def test_a_small_set_has_every_grade_and_enough_devices_to_split():
    plans = plan_dataset(SynthOptions(images=64))
    assert set(Counter(plan.grade for plan in plans)) == {0, 1, 2, 3}
    assert len({(plan.device.site, plan.device.serial) for plan in plans}) >= 10


def test_more_devices_than_people_are_refused():
    with pytest.raises(UserError, match="50 devices are more than the"):
        plan_dataset(SynthOptions(images=30, devices=50))


def test_options_at_zero_switch_a_variation_off():
    plans = plan_dataset(SynthOptions(images=100, color_cast=0))
    assert {plan.device.gains for plan in plans} == {(1.0, 1.0, 1.0)}
    assert len({plan.device.gains for plan in plan_dataset(SynthOptions(images=100))}) > 5


# --- pixels ------------------------------------------------------------------------------------------------


def test_a_photograph_is_a_frame_of_the_microscope():
    pixels = render_image(1.5, DeviceProfile(), np.random.default_rng(1))
    assert pixels.shape == (480, 640, 3)
    assert pixels.dtype == np.uint8
    assert 60 < pixels.mean() < 200
    assert pixels.std() > 15


def test_target_cover_rises_with_severity():
    covers = [flake_coverage(severity) for severity in np.arange(-1, 4, 0.1)]
    assert np.all(np.diff(covers) >= 0)
    assert flake_coverage(0) < 0.003 < flake_coverage(1) < 0.05 < flake_coverage(2) < 0.2 < flake_coverage(3)


def test_laid_cover_rises_with_severity():
    def laid(severity: float) -> float:
        covers = []
        for seed in range(4):
            rng = np.random.default_rng(seed)
            covers.append(float(scene._scatter(severity, 1.0, rng).alpha.mean()))
        return float(np.mean(covers))

    covers = [laid(severity) for severity in (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)]
    assert np.all(np.diff(covers) > 0)
    assert covers[0] < 0.004
    assert covers[6] > 0.2


def test_the_same_scene_with_more_flakes_differs_only_by_flakes():
    """Hairs and skin do not depend on severity: most pixels of two mild photographs are alike."""
    device = DeviceProfile(noise=0, lighting=0)
    one, two = (render_image(s, device, np.random.default_rng(5)).astype(int) for s in (0.0, 0.6))
    assert not np.array_equal(one, two)
    assert np.median(np.abs(one - two)) <= 2


def test_color_and_spread_depend_on_the_scene_and_hardly_on_its_flakes():
    """The camera's exposure and levels hide how much is white; the bounds hold for the paper's grades."""
    color, spread = [], []
    for seed in range(4):
        device = plan_dataset(small())[7 * seed % 20].device
        images = [render_image(severity, device, np.random.default_rng(seed)) for severity in range(4)]
        color.append([image.mean((0, 1)) for image in images])
        spread.append([image.std((0, 1)) for image in images])
    for severity in (1, 2, 3):
        assert np.abs(np.mean(color, axis=0)[severity] - np.mean(color, axis=0)[0]).max() < 4
        assert np.abs(np.mean(spread, axis=0)[severity] - np.mean(spread, axis=0)[0]).max() < 10


# --- files -------------------------------------------------------------------------------------------------


def test_layout_is_the_real_one(dataset):
    out, summary = dataset
    assert sorted(p.name for p in out.iterdir()) == ["Meta", "Training", "Validation", "synth.json"]
    stems = []
    for part in ("Training", "Validation"):
        for folder in sorted((out / part).iterdir()):
            kind, symptom = folder.name[:4], folder.name[4:]
            assert kind in ("[원천]", "[라벨]")
            assert symptom in FOLDERS
            suffix = ".jpg" if kind == "[원천]" else ".json"
            assert {path.suffix for path in folder.iterdir()} == {suffix}
        for path in (out / part).rglob("*.jpg"):
            assert NAME.match(path.name)
            stems.append(path.stem)
            check_texts(out, path)
    assert len(stems) == len(set(stems)) == summary.images == OPTIONS.images
    assert len(list((out / "Meta").iterdir())) == OPTIONS.images


def check_texts(out: Path, photograph: Path) -> None:
    folder = photograph.parent.name.removeprefix("[원천]")
    label = json.loads(
        (photograph.parent.parent / f"[라벨]{folder}" / f"{photograph.stem}.json").read_text("utf-8")
    )
    values = [label.pop(f"value_{number}") for number in range(1, 7)]
    assert all(value in ("0", "1", "2", "3") for value in values)  # strings, as delivered
    assert values[0] == re.search(r"_(\d)\.", folder)[1]
    assert label == {"image_id": photograph.stem, "image_file_name": photograph.name}
    meta = json.loads((out / "Meta" / f"{photograph.stem}_META.json").read_text("utf-8"))
    assert meta["gender"] in ("남", "여")
    assert re.fullmatch(r"\d0대", meta["age"])
    assert meta["location"] == photograph.stem[-2:]


def test_photographs_are_plain_jpegs_of_a_realistic_size(dataset):
    out, _ = dataset
    paths = list(out.rglob("*.jpg"))
    for path in paths[::6]:
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (640, 480))
            assert not image.getexif()
    sizes = np.array([path.stat().st_size for path in paths]) / 1000
    low, middle, high = np.percentile(sizes, [10, 50, 90])
    assert low > 20
    assert 25 < middle < 60
    assert high < 80


def test_the_summary_counts_what_is_there(dataset):
    out, summary = dataset
    assert json.loads((out / "synth.json").read_text("utf-8")) == summary.model_dump(mode="json")
    for part, counts in summary.parts.items():
        for grade, folder in enumerate(FOLDERS):
            assert counts[str(grade)] == len(list((out / part / f"[원천]{folder}").glob("*.jpg")))
    assert sum(summary.grades.values()) == sum(summary.by_device.values()) == OPTIONS.images


def test_the_readers_of_the_real_set_read_it(dataset, tmp_path):
    out, summary = dataset
    found = audited(out, tmp_path, ratio="2:1:1")
    assert found.summary["spec"]["layout"] == "aihub"
    rows = found.table.to_pylist()
    assert len(rows) == OPTIONS.images  # no two photographs alike
    assert not any(found.summary["findings"].values())
    assert len({row["group"] for row in rows}) == summary.devices
    assert all(row["labels"][0] == row["label"] for row in rows)


@pytest.mark.parametrize("layout", ["zipped", "zipped-cp949"])
def test_archives_are_the_same_again_and_left_as_they_are(tmp_path, layout):
    options = small(images=6, devices=1, layout=layout, every_symptom=True)
    one = write_dataset(tmp_path / "one", options, workers=1)
    before = files_of(tmp_path / "one")
    assert not any(name.endswith(".jpg") for name in before)
    assert write_dataset(tmp_path / "one", options, workers=1) == one
    write_dataset(tmp_path / "two", options, workers=1)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") == before


@pytest.mark.slow
def test_grade_cannot_be_read_from_color_spread_or_file_size(tmp_path):
    """A shallow model across devices: near chance on these, yet able to find a signal where there is one."""
    plans = plan_dataset(MANY)
    grades = np.array([plan.grade for plan in plans])
    groups = [plan.device.serial for plan in plans]
    color, spread, size = [], [], []
    for plan in plans:
        path = write_image(plan, tmp_path)
        pixels = np.asarray(Image.open(path), dtype=np.float32).reshape(-1, 3)
        color.append(pixels.mean(0))
        spread.append(pixels.std(0))
        size.append([path.stat().st_size])

    def shallow(features: np.ndarray) -> float:
        models = (
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=500, class_weight="balanced")),
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
            RandomForestClassifier(100, min_samples_leaf=3, random_state=0),
        )
        folds = GroupKFold(5)
        return max(
            kappa(grades, cross_val_predict(model, features, grades, groups=groups, cv=folds))
            for model in models
        )

    assert shallow(np.hstack([color, size])) < 0.35
    assert shallow(np.hstack([color, spread, size])) < 0.45
    flakes = [[plan.severity] for plan in plans]
    assert shallow(np.hstack([color, spread, size, flakes])) > 0.7


# --- again, elsewhere, interrupted -------------------------------------------------------------------------


def test_bytes_depend_on_the_seed_and_not_on_the_number_of_processes(dataset, tmp_path):
    one, summary = dataset  # by one process
    assert write_dataset(tmp_path / "two", OPTIONS, workers=2) == summary
    assert files_of(tmp_path / "two") == files_of(one)


def test_another_seed_gives_other_names_and_pictures(tmp_path):
    plans = [plan_dataset(small(seed=seed)) for seed in (7, 8)]
    assert not {plan.stem for plan in plans[0]} & {plan.stem for plan in plans[1]}
    photographs = [write_image(own[0], tmp_path).read_bytes() for own in plans]
    assert photographs[0] != photographs[1]


def test_a_finished_set_is_left_as_it_is(tmp_path):
    first = write_dataset(tmp_path, small(images=6, devices=1), workers=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    calls: list[int] = []
    assert write_dataset(tmp_path, small(images=6, devices=1), workers=1, on_progress=calls.append) == first
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert calls == []


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    class StopError(Exception):
        pass

    def stop(done: int) -> None:
        if done == 2:
            raise StopError

    options = small(images=5, devices=1)
    broken = tmp_path / "broken"
    with pytest.raises(StopError):
        write_dataset(broken, options, workers=1, on_progress=stop)
    assert not (broken / "synth.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in broken.rglob("*.jpg")}
    assert len(kept) == 2
    # A process that was killed while it wrote leaves this behind.
    third = plan_dataset(options)[2]
    torn = broken / folder_of(third) / f".{third.stem}.jpg.part"
    torn.parent.mkdir(parents=True, exist_ok=True)
    torn.write_bytes(b"half")

    progress: list[int] = []
    write_dataset(broken, options, workers=1, on_progress=progress.append)
    assert progress == [1, 2, 3, 4, 5]
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    write_dataset(tmp_path / "straight", options, workers=1)
    assert files_of(broken) == files_of(tmp_path / "straight")


@pytest.mark.parametrize("stopped", [False, True])
def test_a_folder_of_other_options_is_refused_and_untouched(tmp_path, stopped):
    write_dataset(tmp_path, small(images=3, devices=1), workers=1)
    if stopped:
        (tmp_path / "synth.json").rename(tmp_path / "synth.started.json")
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))} is not empty"):
        write_dataset(tmp_path, small(images=3, devices=1, seed=8), workers=1)
    assert files_of(tmp_path) == before


def test_a_folder_with_other_things_and_a_file_are_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        write_dataset(tmp_path, small(), workers=1)
    with pytest.raises(UserError, match="is a file"):
        write_dataset(tmp_path / "thesis.txt", small(), workers=1)
    assert files_of(tmp_path) == {"thesis.txt": b"mine"}

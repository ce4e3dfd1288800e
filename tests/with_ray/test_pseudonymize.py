"""A data directory that can be handed on: moved, read, and silent about people."""

import io

import pytest
from PIL import Image

from jobs.common.local_executor import LocalExecutor
from jobs.data.prepare import prepare
from jobs.data.pseudonymize import pseudonymize
from scalp_core import storage
from scalp_core.curation.audit import Options
from scalp_core.datasets import manifest
from scalp_core.datasets.locations import Location, read_images
from scalp_core.errors import UserError
from scalp_core.storage import lease, outputs
from tests.support.dicom_files import PATIENT, dicom
from tests.support.images import jpeg
from tests.support.sources import PLANS, write_set


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("named")
    write_set(root / "set")
    exif = Image.Exif()
    exif[0x013B] = "Kim Haneul"
    for path in list((root / "set").rglob("*.jpg"))[:20]:
        image = Image.open(io.BytesIO(path.read_bytes()))
        image.save(path, "JPEG", quality="keep", exif=exif)
    options = Options(ratio="2:1:1", folds=3)
    prepare(str(root / "set"), str(root / "data"), options, executor=LocalExecutor())
    return root / "data"


def test_an_export_can_be_moved_and_names_nobody(data, tmp_path):
    pseudonymize(str(data), str(tmp_path / "made"))
    (tmp_path / "made").rename(tmp_path / "moved")
    before, after = manifest.read_manifest(str(data)), manifest.read_manifest(str(tmp_path / "moved"))
    assert after.num_rows == before.num_rows
    for name in ("label", "split", "fold", "position", "width"):
        assert sorted(map(str, after[name].to_pylist())) == sorted(map(str, before[name].to_pylist()))
    assert len(set(after["device"].to_pylist())) == len(set(before["device"].to_pylist()))
    uris = after["uri"].to_pylist()
    assert all(uri.startswith(str(tmp_path / "moved")) for uri in uris)
    files = list(read_images([Location(uri) for uri in uris], 2**25))
    assert all(isinstance(file, bytes) for file in files)
    secrets = {b"Kim Haneul", b"set/Training", str(data.parent).encode()}
    secrets |= {value.encode() for plan in PLANS for value in (plan.stem, plan.device.serial)}
    for path in (tmp_path / "moved").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not [secret for secret in secrets if secret in content or secret.decode() in str(path)]
    assert not (tmp_path / "moved" / lease.FOLDER).exists()  # which names the machine


def test_codes_are_the_same_again_only_with_the_key(data, tmp_path):
    key = str(tmp_path / "secret" / "key")
    for name, key_file in (("a", key), ("b", key), ("c", None)):
        pseudonymize(str(data), str(tmp_path / name), key_file)
    names = [{path.name for path in (tmp_path / name).rglob("*.jpg")} for name in "abc"]
    assert names[0] == names[1]
    assert not names[0] & names[2]
    assert (tmp_path / "secret" / "key").stat().st_mode & 0o077 == 0


def test_what_makes_no_sense_is_refused(data, tmp_path):
    (tmp_path / "key").write_text("short")
    with pytest.raises(UserError, match="does not hold 64 hexadecimal digits"):
        pseudonymize(str(data), str(tmp_path / "out"), str(tmp_path / "key"))
    with pytest.raises(UserError, match="is in OUT, and would be shared with the images"):
        pseudonymize(str(data), str(tmp_path / "out"), str(tmp_path / "out" / "key"))
    assert not (tmp_path / "out").exists()
    outputs.claim_output(str(tmp_path / "stopped"), "pseudonymize")
    with pytest.raises(UserError, match="of a stopped run, which cannot resume.*; choose a new directory"):
        pseudonymize(str(data), str(tmp_path / "stopped"))
    made = pseudonymize(str(data), str(tmp_path / "made"))
    assert pseudonymize(str(data), str(tmp_path / "made")) == made
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        pseudonymize(str(data), str(tmp_path / "full"))


def test_from_and_to_s3(data, s3):
    summary = pseudonymize(str(data), "s3://scalp/pseudonymized")
    table = manifest.read_manifest("s3://scalp/pseudonymized")
    assert table.num_rows == summary["photographs"]
    assert all(storage.read(uri)[:2] == b"\xff\xd8" for uri in table["uri"].to_pylist()[:3])


def test_dicom_files_are_shared_as_pixels_and_burned_in_text_is_left_out(tmp_path):
    declared = {5: {"BurnedInAnnotation": "YES"}}
    for index in range(12):
        data = dicom(jpeg(index, (320, 240)), (320, 240), **declared.get(index, {}))
        storage.write(str(tmp_path / "set" / str(index % 4) / f"{index}.dcm"), data)
    options = Options(ratio="2:1:1")
    prepare(str(tmp_path / "set"), str(tmp_path / "data"), options, executor=LocalExecutor())
    summary = pseudonymize(str(tmp_path / "data"), str(tmp_path / "out"))
    assert (summary["photographs"], summary["identifying_pixels"], summary["by_format"]) == (
        11,
        1,
        {"jpg": 11},
    )
    for path in (tmp_path / "out").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not [value for value in PATIENT if value.encode() in content]

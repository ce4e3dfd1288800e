import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from jobs.data.pseudonymize import _drop_duplicates, _load_key
from scalp_core.curation.pseudonymize import declares_identity, pseudonym, pseudonymize_row, strip_metadata
from scalp_core.datasets import manifest
from scalp_core.errors import ImageError, UserError
from scalp_core.images.codecs import read_picture
from scalp_core.images.preprocess import Preprocess, decode
from tests.support.dicom_files import PATIENT, dicom
from tests.support.images import jpeg
from tests.support.odd_files import encoded
from tests.support.sources import picture

SECRETS = (
    b"Kim Haneul",
    b"A2LEBJJDE",
    b"2020:10:13",
    b"http://ns.adobe.com",
    b"ICC_PROFILE",
    b"Photoshop",
)


def with_everything(orientation=1, **options):
    """A JPEG with person, place and time in each kind of metadata."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x013B] = "Kim Haneul"
    exif[0x0110] = "A2LEBJJDE00060O"
    exif[0x0132] = "2020:10:13 12:00:00"
    exif.get_ifd(0x8825)[1] = "N"
    image = Image.open(io.BytesIO(picture(0)))
    buffer = io.BytesIO()
    image.save(
        buffer,
        "JPEG",
        quality=90,
        exif=exif,
        comment=b"of Kim Haneul",
        icc_profile=b"ICC_PROFILE of A2LEBJJDE",
        **options,
    )
    data = buffer.getvalue()
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x>Kim Haneul</x>"
    iptc = b"Photoshop 3.0\08BIM Kim Haneul"
    segments = b"".join(
        bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2) + body
        for marker, body in ((0xE1, xmp), (0xED, iptc))
    )
    return data[:2] + segments + data[2:] + b"behind the picture: Kim Haneul"


def pixels(data):
    return read_picture(data, lambda width, height: (width, height)).pixels


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 4}]
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_keeps_its_pixels_and_tells_nothing(options, orientation):
    data = with_everything(orientation, **options)
    assert all(secret in data for secret in SECRETS)
    stripped, suffix = strip_metadata(data)
    assert suffix == ".jpg"
    assert not any(secret in stripped for secret in SECRETS)
    assert dict(Image.open(io.BytesIO(stripped)).getexif()) == ({0x0112: 6} if orientation == 6 else {})
    assert (pixels(stripped) == pixels(data)).all()
    spec = Preprocess(size=96)
    assert (decode(stripped, spec).pixels == decode(data, spec).pixels).all()
    assert strip_metadata(stripped)[0] == stripped


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP"])
def test_other_formats_become_png_with_the_same_pixels(kind):
    exif = Image.Exif()
    exif[0x013B] = "Kim Haneul"
    data = encoded(Image.open(io.BytesIO(picture(0))), kind, **({} if kind == "BMP" else {"exif": exif}))
    stripped, suffix = strip_metadata(data)
    assert suffix == ".png"
    assert b"Kim Haneul" not in stripped
    assert (pixels(stripped) == pixels(data)).all()


def test_colors_that_only_metadata_tells_are_kept():
    cmyk = Image.open(io.BytesIO(jpeg())).convert("CMYK")
    data = encoded(cmyk, "JPEG")
    stripped, _ = strip_metadata(data)
    assert np.array_equal(pixels(stripped), pixels(data))


def test_what_is_no_picture_is_refused():
    for data in (b"", b"a text", jpeg()[:2000]):
        with pytest.raises(ImageError):
            strip_metadata(data)


def test_codes_are_equal_for_equals_and_lead_nowhere():
    one, other = b"1" * 32, b"2" * 32
    assert pseudonym(one, "Kim") == pseudonym(one, "Kim") != pseudonym(other, "Kim")
    row = {"site": "0013", "device": "A2", "group": "0013_A2", "captured_at": 1, "sex": "male", "age": "40s"}
    row |= {"source_note": "Training", "position": "TH", "label": 2}
    coded = pseudonymize_row(row, one)
    assert (coded["position"], coded["label"]) == ("TH", 2)
    assert not {"0013", "A2", "0013_A2", "male", "40s", "Training"} & set(map(str, coded.values()))
    assert coded["captured_at"] is None
    assert pseudonymize_row(row | {"site": None}, one)["site"] is None


def test_a_key_is_kept_on_this_machine_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--key-file s3://scalp/key is not a local file"):
        _load_key("s3://scalp/key", "/out")
    assert not list(tmp_path.iterdir())


def test_equal_contents_are_one_row_and_go_where_their_labels_differ():
    rows = [
        {"image_id": name, "uri": f"{label}/{index}.jpg", "label": label}
        for index, (name, label) in enumerate([("a", 1), ("b", 2), ("a", 0), ("c", 3), ("b", 2), ("d", None)])
    ]
    table = pa.Table.from_pylist(rows, schema=manifest.SCHEMA)
    kept, merged, conflicting = _drop_duplicates(table)
    assert kept["image_id"].to_pylist() == ["b", "c", "d"]
    assert (merged, conflicting) == (1, 2)
    rows[4]["labels"] = [2, 0, 0, 0, 3, 0]  # differs from its copy in another symptom
    kept, merged, conflicting = _drop_duplicates(pa.Table.from_pylist(rows, schema=manifest.SCHEMA))
    assert (kept["image_id"].to_pylist(), merged, conflicting) == (["c", "d"], 0, 4)


@pytest.mark.parametrize("is_jpeg", [True, False])
def test_a_dicom_file_leaves_its_pixels_alone(is_jpeg):
    file = with_everything()
    size = Image.open(io.BytesIO(file)).size
    data = dicom(file if is_jpeg else pixels(file), size)
    stripped, suffix = strip_metadata(data)
    assert suffix == (".jpg" if is_jpeg else ".png")
    assert not [value for value in PATIENT if value.encode() in stripped]
    assert not any(secret in stripped for secret in SECRETS)
    assert (pixels(stripped) == pixels(data)).all()
    assert not declares_identity(data)
    assert not declares_identity(file)


@pytest.mark.parametrize("declared", ["BurnedInAnnotation", "RecognizableVisualFeatures"])
def test_pixels_that_are_declared_to_identify_are_recognized(declared):
    data = dicom(jpeg(), (640, 480), **{declared: "YES"})
    assert declares_identity(data)
    assert not declares_identity(dicom(jpeg(), (640, 480), **{declared: "NO"}))

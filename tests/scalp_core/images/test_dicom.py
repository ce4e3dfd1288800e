"""DICOM files: the grade of the image inside, or one reason why not; and nothing else of the header."""

import builtins
import io
import logging
import struct
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
    VLPhotographicImageStorage,
    generate_uid,
)

from scalp_core.errors import ImageError
from scalp_core.images.codecs import picture_size, read_header, read_picture
from scalp_core.images.preprocess import Preprocess, decode
from tests.support.dicom_files import PATIENT, dicom
from tests.support.images import jpeg
from tests.support.odd_files import encoded, picture

SPEC = Preprocess(size=96)
JPEG = jpeg(size=(320, 240))
PIXELS = np.asarray(picture())
SMALL = PIXELS[:16, :24]


def refusal(data):
    with pytest.raises(ImageError) as caught:
        decode(data, SPEC)
    return caught.value


@pytest.mark.parametrize("fragments", [1, 4])
@pytest.mark.parametrize("kind", [VLPhotographicImageStorage, SecondaryCaptureImageStorage, None])
def test_a_jpeg_in_a_dicom_file_has_the_pixels_of_the_jpeg(kind, fragments):
    data = dicom(JPEG, SIZE, fragments=fragments, **({"SOPClassUID": kind} if kind else {}))
    assert (decode(data, SPEC).pixels == decode(JPEG, SPEC).pixels).all()
    assert picture_size(data) == SIZE
    assert read_header(data) == read_header(JPEG)


@pytest.mark.parametrize("syntax", [None, ImplicitVRLittleEndian])
@pytest.mark.parametrize("size", [(320, 240), (31, 15)])
def test_uncompressed_pixels_are_those_of_a_png(syntax, size):
    image = picture(*size)
    expected = decode(encoded(image, "PNG"), SPEC).pixels
    assert (decode(dicom(np.asarray(image), syntax=syntax), SPEC).pixels == expected).all()
    planes = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    data = dicom(planes, size, syntax, PlanarConfiguration=1)
    assert (decode(data, SPEC).pixels == expected).all()
    assert read_header(data).cost == size[0] * size[1] / 1e6


def nested(depth):
    """A header with sequences of undefined length in each other."""
    return insert(begin() * depth)


def begin():
    """The begin of a sequence and of its item, both of undefined length."""
    item = b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    return struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + item


def long_value(value, element):
    return struct.pack("<HH2sHL", 0x0008, element, b"UT", 0, len(value)) + value


def insert(elements):
    data = dicom(SMALL)
    at = data.index(struct.pack("<HH", 0x0008, 0x0016), 132)
    return data[:at] + elements + data[at:]


def lying(length):
    """Pixel data that announce another length than they have."""
    data = dicom(SMALL)
    at = data.index(struct.pack("<HH2sH", 0x7FE0, 0x0010, b"OB", 0)) + 8
    return data[:at] + struct.pack("<L", length) + data[at + 4 :]


SIZE = (320, 240)  # of JPEG
UNIT = struct.pack("<HH2sH", 0x0008, 0x0001, b"UL", 0)
DEFLATED = DeflatedExplicitVRLittleEndian
COLORS = "PhotometricInterpretation"
FORMAT, MODE, BAD = "unsupported_format", "unsupported_mode", "corrupt"
REFUSED = {
    "gray": (lambda: one_sample("MONOCHROME2"), MODE, "MONOCHROME2"),
    "palette": (lambda: one_sample("PALETTE COLOR"), MODE, "PALETTE"),
    "16 bits": (lambda: dicom(SMALL, BitsAllocated=16), MODE, "16 bits"),
    "signed": (lambda: dicom(SMALL, PixelRepresentation=1), MODE, "RGB"),
    "other colors": (lambda: dicom(SMALL, **{COLORS: "KIM"}), MODE, "unknown colors"),
    "frames": (lambda: dicom(SMALL, NumberOfFrames=3), FORMAT, "3 frames; save one as JPEG"),
    "frames of JPEG": (lambda: dicom(JPEG, SIZE, NumberOfFrames=2), FORMAT, "2 frames"),
    "RLE": (lambda: dicom(JPEG, SIZE, RLELossless), FORMAT, "RLE Lossless (1.2.840.10008.1.2.5); save"),
    "JPEG 2000": (lambda: dicom(JPEG, SIZE, JPEG2000), FORMAT, "JPEG 2000"),
    "deflated": (lambda: dicom(SMALL, syntax=DEFLATED), FORMAT, "Deflated"),
    "other syntax": (lambda: other_syntax(b"1.2.840.10008.9.99\0"), FORMAT, "unknown to the DICOM standard"),
    "directory": (lambda: dicom(None, SOPClassUID=MediaStorageDirectoryStorage), FORMAT, "Directory Storage"),
    "other class": (lambda: dicom(SMALL, SOPClassUID=generate_uid()), FORMAT, "class unknown to"),
    "no pixels": (lambda: dicom(None), BAD, "no pixel data"),
    "many pixels": (lambda: dicom(SMALL, (60_000, 60_000)), "too_many_pixels", "60000x60000 pixels"),
    "many frames": (lambda: dicom(SMALL, NumberOfFrames=2**30), "too_many_pixels", "24x16x1073741824"),
    "fewer pixels": (lambda: dicom(SMALL, (24, 17)), BAD, "24x17 pixels need 1,224"),
    "more pixels": (lambda: dicom(SMALL, (24, 15)), BAD, "24x15 pixels need 1,080"),
    "no rows": (lambda: dicom(SMALL, Rows=None), BAD, "no valid Rows"),
    "several rows": (lambda: dicom(SMALL, Rows=[16, 16]), BAD, "no valid Rows"),
    "other size": (lambda: dicom(JPEG, (640, 240)), BAD, "says 640x240 pixels, the JPEG has 320x240"),
    "GIF": (lambda: dicom(b"GIF89a" + bytes(99), (8, 8)), FORMAT, "a GIF file"),
    "no image": (lambda: dicom(bytes(100), (8, 8)), "not_an_image", "not one of"),
    "PNG": (lambda: dicom(encoded(picture(8, 8), "PNG"), (8, 8)), BAD, "announces a JPEG"),
    "cut JPEG": (lambda: dicom(JPEG[:5000], SIZE), "truncated", "the JPEG ends before"),
    "longer": (lambda: lying(2**32 - 2), "truncated", "ends before its pixels"),
    "endless": (lambda: lying(2**32 - 1), "truncated", "ends before its pixels"),
    "nested": (lambda: nested(5_000), BAD, "cannot be read"),
    "a million elements": (lambda: insert(UNIT * 10**6), BAD, "far larger"),
    "many character sets": (lambda: insert(long_value(b"X\\" * 10**6, 0x0005)), BAD, "far larger"),
    "many in an item": (lambda: insert(begin() + long_value(b"X\\" * 10**6, 0x0005)), BAD, "far larger"),
    "many classes": (lambda: insert(long_value(b"1\\" * 10**6, 0x0016)), BAD, "far larger"),
    "JPEG of unknown colors": (
        lambda: dicom(JPEG.replace(b"JFIF\0", b"JFIX\0"), SIZE, **{COLORS: "RGB"}), MODE, "does not say what"
    ),
}  # fmt: skip


def one_sample(colors):
    return dicom(SMALL[:, :, 0], (24, 16), SamplesPerPixel=1, PhotometricInterpretation=colors)


def other_syntax(uid):
    data = dicom(SMALL)
    return data.replace(b"1.2.840.10008.1.2.1\0", uid.ljust(20, b"\0"), 1)


@pytest.mark.parametrize("name", REFUSED)
def test_an_odd_file_is_refused_with_its_reason(name):
    make, code, words = REFUSED[name]
    data = make()
    error = refusal(data)
    assert error.code == code
    assert words in error.message


def secrets(text):
    return [value for value in (*PATIENT, "Lee^Doctor") if value in text]


@pytest.mark.parametrize("damage", ["none", "values", "moved"])
def test_no_value_of_the_header_is_warned_of_or_logged(damage, caplog, capfd):
    data = dicom(SMALL)
    if damage == "values":  # values that their types forbid: pydicom warns of them
        data = data.replace(b"1.2.840.10008.5.1.4.1.1.77.1.7", b"Kim^Haneul".ljust(30))
        data = data.replace(b"RGB ", b"P-47")
    elif damage == "moved":  # the text of a name is read as the number of frames
        data = data.replace(
            struct.pack("<HH", 0x0010, 0x0010) + b"PN", struct.pack("<HH", 0x0028, 0x0008) + b"IS"
        )
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.DEBUG):
        try:
            decode(data, SPEC)
            message = ""
        except ImageError as error:
            message = f"{error} {error.__cause__}"
    said = [message, caplog.text, *capfd.readouterr(), *(str(warning.message) for warning in warned)]
    assert not secrets(" ".join(said))
    assert bool(message) == (damage != "none")


@pytest.mark.medium
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    is_jpeg=st.booleans(),
    edits=st.lists(st.tuples(st.integers(132, 1200), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.one_of(st.none(), st.integers(132, 1500)),
)
def test_any_damage_of_a_header_is_graded_or_refused(is_jpeg, edits, cut):
    data = bytearray(dicom(JPEG, (320, 240)) if is_jpeg else dicom(SMALL))
    for place, value in edits:
        data[min(place, len(data) - 1)] = value
    try:
        picture = read_picture(bytes(data[:cut]), lambda *_: (64, 64))
    except ImageError as error:
        assert error.code != "internal_error"
        assert not secrets(error.message)
    else:
        assert picture.pixels.ndim == 3


def test_without_pydicom_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "pydicom" or (name == "scalp_core.images" and "dicom" in (arguments[2] or ())):
            raise ModuleNotFoundError("No module named 'pydicom'", name="pydicom")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    error = refusal(dicom(SMALL))
    assert error.code == "unsupported_format"
    assert "install the extra scalp[clinical], or save it as JPEG" in error.message


def test_pydicom_is_imported_only_for_a_dicom_file():
    program = (
        "import sys\nfrom scalp_core.images.codecs import picture_size\n"
        "from tests.support.images import jpeg\n"
        "picture_size(jpeg())\nsys.exit('pydicom' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_files_of_these_tests_are_valid_dicom():
    dataset = dcmread(io.BytesIO(dicom(JPEG, SIZE, fragments=2)))
    assert dataset.pixel_array.shape == (240, 320, 3)

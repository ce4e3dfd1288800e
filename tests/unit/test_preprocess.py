import io

import numpy as np
import pytest
from PIL import Image

from scalp_core import preprocess
from scalp_core.errors import ImageError
from scalp_core.preprocess import Preprocess, decode
from tests.conftest import jpeg

SPEC = Preprocess(size=96)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_photograph_becomes_a_square_of_bytes():
    square = decode(jpeg(), SPEC)
    assert square.shape == (96, 96, 3)
    assert square.dtype == np.uint8
    assert square.std() > 10


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF"])
def test_the_same_picture_in_another_format_looks_the_same(kind):
    image = Image.open(io.BytesIO(jpeg())).resize((192, 192))
    options = {"lossless": True} if kind == "WEBP" else {}
    expected = np.asarray(image.resize((96, 96), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(decode(encoded(image, kind, **options), SPEC), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_colour_mode_becomes_rgb(mode):
    image = Image.open(io.BytesIO(jpeg())).convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert decode(encoded(image, kind), SPEC).shape == (96, 96, 3)


def test_sixteen_bits_keep_their_brightness():
    ramp = np.linspace(0, 65535, 96, dtype=np.uint16)[None].repeat(96, 0)
    square = decode(encoded(Image.fromarray(ramp), "PNG"), SPEC)
    np.testing.assert_allclose(square[:, :, 0], ramp >> 8, atol=1)


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (96, 96), "black")
    image.paste("white", (0, 0, 96, 48))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: to be shown a quarter turn clockwise
    square = decode(encoded(image, "JPEG", exif=exif, quality=95), SPEC)
    assert square[:, 60:].mean() > 250
    assert square[:, :36].mean() < 5


def test_scaled_decoding_stays_close_to_full_decoding():
    data = jpeg(3)
    full = Image.open(io.BytesIO(data)).resize((96, 96), Image.Resampling.BILINEAR)
    difference = np.abs(decode(data, SPEC).astype(int) - np.asarray(full).astype(int))
    assert difference.mean() < 1.5


def refusal(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, SPEC)
    return caught.value.code


def test_refusals_are_named():
    assert refusal(b"") == "empty"
    assert refusal(b"this is a text") == "not_an_image"
    assert refusal(b"<html>404</html>") == "not_an_image"
    assert refusal(encoded(Image.new("RGB", (8, 8)), "GIF")) == "not_an_image"
    assert refusal(b"\xff" * (preprocess.MAX_BYTES + 1)) == "too_many_bytes"
    assert refusal(encoded(Image.new("1", (8000, 8000)), "PNG")) == "too_many_pixels"
    assert refusal(encoded(Image.new("F", (8, 8)), "TIFF")) == "unsupported_mode"


@pytest.mark.parametrize("eighth", range(1, 8))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_a_cut_file_is_refused_never_half_graded(kind, eighth):
    data = encoded(Image.open(io.BytesIO(jpeg())), kind)
    assert refusal(data[: len(data) * eighth // 8]) in {"truncated", "corrupt", "not_an_image"}

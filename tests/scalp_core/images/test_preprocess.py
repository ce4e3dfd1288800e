import io
from functools import cache

import numpy as np
import pytest
from cykooz_resizer import CpuExtensions, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from PIL import Image, ImageOps

from scalp_core.errors import ImageError
from scalp_core.images.codecs import FIRST_FRAME_ONLY, picture_size, read_picture
from scalp_core.images.preprocess import Preprocess, decode
from tests.support.images import jpeg
from tests.support.odd_files import encoded, picture, sound_files

SPEC = Preprocess(size=96)
FAST = {"compress_level": 1}  # PNG


def pillow(image: Image.Image, size: tuple[int, int] = (96, 96), **options) -> np.ndarray:
    """The reference: Pillow's own decoding and resize."""
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR, **options)).astype(int)


def test_a_photograph_becomes_a_square_of_bytes():
    square = decode(jpeg(), SPEC).pixels
    assert square.shape == (96, 96, 3)
    assert square.dtype == np.uint8
    assert square.flags.writeable
    assert square.std() > 10


@pytest.mark.parametrize("name", sorted(sound_files()))
def test_every_kind_shows_the_same_picture(name):
    """JPEG of every color space, all color modes and depths."""
    square = decode(sound_files()[name], SPEC).pixels
    expected = pillow(picture())
    if name.startswith("jpeg_exif"):
        exif_turned = ImageOps.exif_transpose(Image.open(io.BytesIO(sound_files()[name])))
        expected = pillow(exif_turned)
    elif ("16bit" in name and "rgb" not in name) or name in ("jpeg_gray", "png_L", "png_LA", "png_1"):
        expected = pillow(picture().convert("L"))
    elif name in ("webp_alpha", "png_clear"):
        clear = picture().convert("RGBA")
        clear.putalpha(Image.linear_gradient("L").resize(clear.size))
        expected = pillow(Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear))
    elif name == "jpeg_ycck":  # the same bytes under another reading: only Pillow knows the colors
        expected = pillow(Image.open(io.BytesIO(sound_files()[name])))
    tolerance = 12 if name in ("png_1", "png_P", "png_palette_alpha", "tiff_jpeg", "tiff_lab") else 2.5
    assert np.abs(square - expected).mean() < tolerance


def test_the_resize_is_pillows_to_one_level():
    for size in ((640, 480), (100, 77), (97, 95), (1000, 3), (5, 4)):
        image = picture(*size)
        assert np.abs(decode(encoded(image, "PNG"), SPEC).pixels - pillow(image)).max() <= 1


def test_the_resize_gives_the_same_bytes_whatever_the_processor_can():
    source = ImageData(320, 240, PixelType.U8x3, picture().tobytes())
    results = set()
    for extensions in (CpuExtensions.none, CpuExtensions.sse4_1, CpuExtensions.avx2):
        resizer, result = Resizer(), ImageData(96, 96, PixelType.U8x3)
        resizer.cpu_extensions = extensions
        resizer.resize(source, result, ResizeOptions(resize_alg=ResizeAlg.convolution(FilterType.bilinear)))
        results.add(result.get_buffer())
    assert results == {decode(encoded(picture(), "PNG"), SPEC).pixels.tobytes()}


@pytest.mark.parametrize("size", [(320, 240), (240, 320), (96, 96), (40, 30)])
def test_crop_takes_the_middle_square(size):
    width, height = size
    side = min(size)
    box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    square = decode(encoded(picture(*size), "PNG"), Preprocess(size=96, resize="crop")).pixels
    assert np.abs(square - pillow(picture(*size), box=box)).max() <= 1


@pytest.mark.parametrize(
    ("size", "content"), [((320, 240), (96, 72)), ((60, 240), (24, 96)), ((9, 9), (96, 96))]
)
def test_pad_keeps_the_shape_between_bars_of_the_mean(size, content):
    spec = Preprocess(size=96, resize="pad", mean=(0.2, 0.4, 0.6))
    square = decode(encoded(picture(*size), "PNG"), spec).pixels
    left, top = (96 - content[0]) // 2, (96 - content[1]) // 2
    inside = square[top : top + content[1], left : left + content[0]]
    assert np.abs(inside - pillow(picture(*size), content)).max() <= 1
    bars = np.ones((96, 96), bool)
    bars[top : top + content[1], left : left + content[0]] = False
    assert (square[bars] == [51, 102, 153]).all()


@pytest.mark.medium
@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_a_large_jpeg_gives_what_its_pixels_give(resize):
    """Scaled decoding knows how each way uses the picture."""
    image, spec = picture(1600, 900), Preprocess(size=96, resize=resize)
    scaled = decode(encoded(image, "JPEG", quality=95), spec).pixels
    full = decode(encoded(image, "PNG", **FAST), spec).pixels
    assert np.abs(scaled.astype(int) - full).mean() < 2.5  # colors as steep as no photograph's


def test_a_jpeg_is_decoded_no_larger_than_needed():
    shown = read_picture(encoded(picture(1600, 1200), "JPEG"), lambda *_: (224, 224)).pixels
    assert shown.shape == (300, 400, 3)


@cache
def turned(kind, orientation):
    """A file with an orientation in its metadata, and the upright picture as PNG."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True, "method": 0}, "JPEG": {"quality": 95}, "PNG": FAST}.get(kind, {})
    data = encoded(picture(), kind, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    return data, encoded(upright, "PNG", **FAST)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_photographs_are_turned_upright(orientation, kind, resize):
    data, upright = turned(kind, orientation)
    spec = Preprocess(size=96, resize=resize)
    difference = np.abs(decode(data, spec).pixels.astype(int) - decode(upright, spec).pixels)
    assert difference.mean() < 1.5


def test_sixteen_bits_keep_their_brightness():
    ramp = np.linspace(0, 65535, 96, dtype=np.uint16)[None].repeat(96, 0)
    square = decode(encoded(Image.fromarray(ramp), "PNG"), SPEC).pixels
    np.testing.assert_allclose(square[:, :, 0], ramp >> 8, atol=1)


def test_of_several_pictures_the_first_is_graded_with_a_note():
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    for kind in ("PNG", "WEBP", "TIFF"):
        decoded = decode(encoded(red, kind, save_all=True, append_images=[blue, red]), SPEC)
        assert decoded.notes == (FIRST_FRAME_ONLY,)
        assert decoded.pixels[:, :, 0].min() > 240
        assert decoded.pixels[:, :, 2].max() < 15
        assert decode(encoded(red, kind), SPEC).notes == ()


def test_the_size_is_known_from_the_header_alone():
    data = encoded(picture(321, 123), "JPEG")
    assert picture_size(data[: len(data) // 3]) == (321, 123)


def test_a_code_that_nobody_declared_is_a_mistake_of_ours():
    with pytest.raises(ValueError, match="IMAGE_CODES"):
        ImageError("odd", "…")

"""Every kind of image is read as upright [H, W, 3] uint8; every bad one raises `BadImage`."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from spatial_ssrl_jax.common.errors import BadImage
from spatial_ssrl_jax.data import images
from spatial_ssrl_jax.data.images import image_size, open_image
from tests.conftest import ROOT

PHOTOS = ROOT.parent / "shared" / "photos"
HEIGHT, WIDTH = 6, 9


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def check(image: np.ndarray, expected: np.ndarray, tolerance: int = 0) -> None:
    assert image.dtype == np.uint8
    assert image.shape == expected.shape
    assert image.flags.c_contiguous and image.flags.writeable
    assert np.abs(image.astype(int) - expected.astype(int)).max() <= tolerance


@pytest.mark.parametrize("ending", ["png", "bmp", "webp"])
def test_rgb_is_read_as_it_is(tmp_path, rgb, ending):
    path = tmp_path / f"a.{ending}"
    Image.fromarray(rgb).save(path, **({"lossless": True} if ending == "webp" else {}))
    check(open_image(path), rgb)
    check(open_image(str(path)), rgb)
    check(open_image(path.read_bytes()), rgb)
    assert image_size(path) == (WIDTH, HEIGHT)
    assert image_size(path.read_bytes()) == (WIDTH, HEIGHT)


def test_alpha_is_dropped_not_blended(tmp_path, rgb):
    alpha = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH, 1)
    Image.fromarray(np.concatenate([rgb, alpha], 2)).save(tmp_path / "a.png")
    check(open_image(tmp_path / "a.png"), rgb)


def test_grey_and_grey_with_alpha(tmp_path, rgb):
    grey = rgb[..., 0]
    Image.fromarray(grey).save(tmp_path / "l.png")
    Image.merge("LA", [Image.fromarray(grey), Image.fromarray(rgb[..., 1])]).save(
        tmp_path / "la.png"
    )
    Image.fromarray(grey > 127).save(tmp_path / "1.png")
    expected = np.repeat(grey[..., None], 3, axis=2)
    check(open_image(tmp_path / "l.png"), expected)
    check(open_image(tmp_path / "la.png"), expected)
    check(open_image(tmp_path / "1.png"), np.where(expected > 127, 255, 0))


def test_palette_with_and_without_transparency(tmp_path, rgb):
    palette = Image.fromarray(rgb).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    palette.save(tmp_path / "p.png")
    palette.save(tmp_path / "t.png", transparency=3)
    palette.save(tmp_path / "p.bmp")
    for name in ("p.png", "t.png", "p.bmp"):
        check(open_image(tmp_path / name), expected)


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, ending):
    values = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{ending}")
    expected = np.rint(values / 65535 * 255).astype(np.uint8)
    check(open_image(tmp_path / f"a.{ending}"), np.repeat(expected[..., None], 3, axis=2))


def test_cmyk(tmp_path):
    # Cyan ink alone leaves green and blue.
    Image.new("CMYK", (16, 8), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=100)
    check(open_image(tmp_path / "a.jpg"), np.full((8, 16, 3), (0, 255, 255)), tolerance=3)


TURNS = {  # what undoes each EXIF orientation
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_exif_orientation(tmp_path, rgb, orientation, ending):
    path = tmp_path / f"a.{ending}"
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(rgb).save(path, exif=exif)
    stored = np.asarray(Image.open(path).convert("RGB"))
    upright = TURNS[orientation](stored)
    check(open_image(path), upright)
    assert image_size(path) == upright.shape[1::-1]


def test_animations_give_their_first_frame(tmp_path, rgb):
    frames = [Image.fromarray(rgb), Image.fromarray(255 - rgb)]
    for ending, options in (("png", {}), ("webp", {"lossless": True})):
        path = tmp_path / f"a.{ending}"
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        assert Image.open(path).n_frames == 2
        check(open_image(path), rgb)


def test_size_reads_the_header_only(tmp_path, rgb, monkeypatch):
    Image.fromarray(rgb).save(tmp_path / "a.png")

    def refuse(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", refuse)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    assert image_size(tmp_path / "a.png") == (WIDTH, HEIGHT)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its pixels do not have."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b"\0"), b"IEND"]
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bad_files() -> dict[str, bytes]:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
    whole = {}
    for format in ("JPEG", "PNG", "WEBP"):
        buffer = io.BytesIO()
        image.save(buffer, format)
        whole[format] = buffer.getvalue()
    floats = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(floats, "TIFF")
    return {
        "cut.jpg": whole["JPEG"][: len(whole["JPEG"]) // 2],
        "cut.png": whole["PNG"][: len(whole["PNG"]) // 2],
        "cut.webp": whole["WEBP"][: len(whole["WEBP"]) // 2],
        "header.jpg": whole["JPEG"][:20],
        "empty.jpg": b"",
        "text.jpg": b"<html>404 Not Found</html>",
        "zero.png": png_of_size(0, 5),
        "huge.png": png_of_size(20_000, 20_000),
        "float.tiff": floats.getvalue(),
    }


@pytest.mark.parametrize("name", bad_files())
def test_bad_images_are_named(tmp_path, name):
    content = bad_files()[name]
    (tmp_path / name).write_bytes(content)
    for call in (
        lambda: open_image(tmp_path / name),
        lambda: open_image(content, name=name),
    ):
        with pytest.raises(BadImage, match=name) as caught:
            call()
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize("name", ["empty.jpg", "text.jpg", "zero.png", "huge.png"])
def test_size_of_bad_images(tmp_path, name):
    (tmp_path / name).write_bytes(bad_files()[name])
    with pytest.raises(BadImage, match=name):
        image_size(tmp_path / name)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(BadImage, match=r"gone\.jpg: there is no such file"):
        open_image(tmp_path / "gone.jpg")
    with pytest.raises(BadImage, match=str(tmp_path)):
        open_image(tmp_path)


def test_the_limit_is_on_pixels(tmp_path, rgb, monkeypatch):
    Image.fromarray(rgb).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", WIDTH * HEIGHT - 1)
    with pytest.raises(BadImage, match=f"{WIDTH}x{HEIGHT}"):
        open_image(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", WIDTH * HEIGHT)
    check(open_image(tmp_path / "a.png"), rgb)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"{PHOTOS} is missing")
@pytest.mark.parametrize(
    "name, size",
    [("eg1", (375, 500)), ("eg2", (640, 427)), ("eg3", (640, 426)), ("eg4", (640, 480))],
)
def test_real_photos(name, size):
    image = open_image(PHOTOS / f"{name}.jpg")
    assert image.shape == (size[1], size[0], 3)
    assert image.std() > 20
    assert image_size(PHOTOS / f"{name}.jpg") == size

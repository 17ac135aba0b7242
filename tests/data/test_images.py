"""Every kind of image is read as upright [H, W, 3] uint8; every bad one raises `BadImage`."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from spatial_ssrl_jax.common.errors import BadImage
from spatial_ssrl_jax.data import images
from spatial_ssrl_jax.data.images import (
    image_size,
    open_image,
    open_source_image,
    upright_rgb,
)
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


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours [H, W, 3] of alpha [H, W] over white, rounded to the nearest."""
    colours, alpha = colours.astype(int), alpha.astype(int)[..., None]
    return ((2 * (colours * alpha + 255 * (255 - alpha)) + 255) // 510).astype(np.uint8)


@pytest.fixture
def alpha() -> np.ndarray:
    """[H, W] uint8: from 0 to 255."""
    return np.linspace(0, 255, HEIGHT * WIDTH).astype(np.uint8).reshape(HEIGHT, WIDTH)


@pytest.mark.parametrize("ending", ["png", "webp", "tiff"])
def test_alpha_is_put_on_white_or_dropped(tmp_path, rgb, alpha, ending):
    path = tmp_path / f"a.{ending}"
    rgba = Image.fromarray(np.concatenate([rgb, alpha[..., None]], 2))
    rgba.save(path, **({"lossless": True, "exact": True} if ending == "webp" else {}))
    check(open_image(path), on_white(rgb, alpha))
    check(open_image(path, transparency="drop"), rgb)
    check(open_source_image(path), on_white(rgb, alpha))
    check(open_source_image(path, transparency="drop"), rgb)


def test_black_on_nothing_can_be_seen(tmp_path):
    image = Image.new("RGBA", (40, 20))  # transparent black, as editors write it
    ImageDraw.Draw(image).rectangle((2, 2, 9, 9), fill=(0, 0, 0, 255))
    image.save(tmp_path / "a.png")
    found = open_image(tmp_path / "a.png")
    assert found[5, 5].tolist() == [0, 0, 0] and found[15, 5].tolist() == [255, 255, 255]
    assert not open_image(tmp_path / "a.png", transparency="drop").any()


def test_a_turned_image_with_alpha(tmp_path, rgb, alpha):
    exif = Image.Exif()
    exif[274] = 6
    image = Image.fromarray(np.concatenate([rgb, alpha[..., None]], 2))
    image.save(tmp_path / "a.png", exif=exif)
    check(open_image(tmp_path / "a.png"), np.rot90(on_white(rgb, alpha), -1))


def test_images_in_memory_with_alpha(rgb, alpha):
    """Those that a caller opened, and forms that Pillow alone has: premultiplied, and PA."""
    rgba = Image.fromarray(np.concatenate([rgb, alpha[..., None]], 2))
    check(upright_rgb(rgba, "a"), on_white(rgb, alpha))
    premultiplied = rgba.convert("RGBa")
    back = np.asarray(premultiplied.convert("RGBA"))
    check(upright_rgb(premultiplied, "a"), on_white(back[..., :3], alpha))
    palette = Image.fromarray(rgb).quantize(16)
    expected = on_white(np.asarray(palette.convert("RGB")), alpha)
    palette = palette.convert("PA")
    palette.putalpha(Image.fromarray(alpha))
    check(upright_rgb(palette, "a"), expected)


def test_grey_and_grey_with_alpha(tmp_path, rgb, alpha):
    grey = rgb[..., 0]
    Image.fromarray(grey).save(tmp_path / "l.png")
    Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]).save(tmp_path / "la.png")
    Image.fromarray(grey > 127).save(tmp_path / "1.png")
    expected = np.repeat(grey[..., None], 3, axis=2)
    check(open_image(tmp_path / "l.png"), expected)
    check(open_image(tmp_path / "la.png"), on_white(expected, alpha))
    check(open_image(tmp_path / "la.png", transparency="drop"), expected)
    check(open_image(tmp_path / "1.png"), np.where(expected > 127, 255, 0))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_palette_with_and_without_transparency(tmp_path, rgb):
    palette = Image.fromarray(rgb).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    alphas = np.linspace(0, 255, 16).astype(np.uint8)
    palette.save(tmp_path / "p.png")
    palette.save(tmp_path / "p.bmp")
    palette.save(tmp_path / "index.png", transparency=3)
    palette.save(tmp_path / "index.gif", transparency=3)
    palette.save(tmp_path / "each.png", transparency=alphas.tobytes())
    indices = np.asarray(palette)
    of_index = on_white(expected, np.where(indices == 3, 0, 255))
    for name, blended in (
        ("p.png", expected),
        ("p.bmp", expected),
        ("index.png", of_index),
        ("index.gif", of_index),
        ("each.png", on_white(expected, alphas[indices])),
    ):
        check(open_image(tmp_path / name), blended)
        check(open_image(tmp_path / name, transparency="drop"), expected)


# Two pixels side by side, the second of the transparent colour: bits a sample, PNG's colour type,
# the row, the colour, and the first pixel as it is read.
COLOUR_KEYS = {
    "grey of 2 bits": (2, 0, b"\x60", b"\0\2", (85, 85, 85)),
    "grey of 4 bits": (4, 0, b"\x35", b"\0\5", (51, 51, 51)),
    "grey of 8 bits": (8, 0, b"\3\5", b"\0\5", (3, 3, 3)),
    "grey of 16 bits": (16, 0, b"\x12\x34\x12\x35", b"\x12\x35", (18, 18, 18)),
    "colour of 8 bits": (8, 2, b"\1\2\3\4\5\6", b"\0\4\0\5\0\6", (1, 2, 3)),
    "colour of 16 bits": (16, 2, b"\1\0\2\0\3\0\4\0\5\0\6\0", b"\4\0\5\0\6\0", (1, 2, 3)),
}


@pytest.mark.parametrize("kind", COLOUR_KEYS)
def test_one_colour_of_a_png_is_transparent(kind):
    depth, colour_type, row, key, first = COLOUR_KEYS[kind]
    header = struct.pack(">IIBBBBB", 2, 1, depth, colour_type, 0, 0, 0)
    file = png_of_chunks({b"IHDR": header, b"tRNS": key, b"IDAT": zlib.compress(b"\0" + row)})
    assert open_image(file).tolist() == [[list(first), [255, 255, 255]]]
    dropped = open_image(file, transparency="drop").tolist()[0]
    assert dropped[0] == list(first) and dropped[1] != [255, 255, 255]


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
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return png_of_chunks({b"IHDR": header, b"IDAT": zlib.compress(b"\0")})


def png_of_chunks(chunks: dict[bytes, bytes]) -> bytes:
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in (*chunks.items(), (b"IEND", b""))
    ]
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


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pillow would start Ghostscript, whatever the file's name."""
    Image.new("RGB", (40, 30)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("ran a program"))
    for read in (open_image, image_size):
        with pytest.raises(BadImage, match=r"x\.png: is PostScript, which is not read"):
            read(tmp_path / "x.png")

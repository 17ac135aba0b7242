"""`folder:`: which images it lists, which it leaves out, and how it says so."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from spatial_ssrl_jax import preview
from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.data.images import open_image, reads_heif
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.data.sources.mixture import source_notes
from tests.data.test_rgbd_layouts import LAYOUTS, save_units, write
from tests.data.test_sources import HEIGHT, WIDTH, ramp, save_depth, save_image


@pytest.mark.parametrize("name", [*LAYOUTS, "beside"])
def test_a_folder_of_photos_has_no_depth_maps(tmp_path: Path, name: str):
    beside: dict[str, float | None] = {"b.png": None, "b_depth.png": 1000, "c_depth.jpg": None}
    files = LAYOUTS[name][0] if name in LAYOUTS else beside
    write(tmp_path, files)
    if name == "beside":
        Image.new("L", (WIDTH, HEIGHT), 255).save(tmp_path / "b_depth_mask.png")
        save_units(tmp_path / "other/sync_depth_00000.png", 1000)
        save_image(tmp_path / "other/rgb_00000.jpg")
        files = files | {"other/rgb_00000.jpg": None}
        left_out = 3
    else:
        left_out = sum(unit is not None for unit in files.values())
    source = open_source(f"folder:{tmp_path}")
    photos = sorted(name for name, unit in files.items() if unit is None)
    assert [source.name(i) for i in range(len(source))] == photos
    (note,) = source_notes(source)
    assert f"depth maps and masks left out: {left_out}, for example " in note


def test_grey_images_of_16_bits_are_depth_only_beside_photos(tmp_path: Path):
    for name in ("x/1.png", "x/2.png"):
        save_units(tmp_path / name, 1000)
    source = open_source(f"folder:{tmp_path}")  # a folder of nothing else: X-ray images, perhaps
    assert (len(source), source_notes(source)) == (2, [])
    write(tmp_path, {"y/1.jpg": None, "x/3.png": None})
    source = open_source(f"folder:{tmp_path}")
    assert [source.name(i) for i in range(len(source))] == ["x/3.png", "y/1.jpg"]


def test_preview_says_what_is_left_out(tmp_path: Path, capsys):
    save_image(tmp_path / "src/a.png", (112, 112))
    save_depth(tmp_path / "src/a_depth.png", ramp((112, 112)))
    options = ["--tasks=flip", "--count=1", "--json"]
    preview.main([f"--source=folder:{tmp_path}/src", f"--out={tmp_path}/out", *options])
    (note,) = json.loads(capsys.readouterr().out)["warnings"]
    assert note.endswith("depth maps and masks left out: 1, for example a_depth.png")
    assert note in (tmp_path / "out/index.html").read_text()


# ------------------------------------------------------------------- images of other formats


def save_as(path: Path, format: str) -> None:
    values = np.full((HEIGHT, WIDTH, 3), (200, 30, 90), np.uint8)
    Image.fromarray(values).save(path, format)


@pytest.mark.parametrize("name", ["a.TIF", "a.tiff", "a.gif", "a.avif", "a.heic"])
def test_other_images_are_read_where_pillow_can(tmp_path: Path, name: str, monkeypatch):
    format = {"heic": "HEIF", "tif": "TIFF"}.get(name[2:].lower(), name[2:].upper())
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow has no AVIF here")
    if format == "HEIF":
        pytest.importorskip("pillow_heif", reason="pip install 'spatial_ssrl_jax[heif]'")
        assert reads_heif()
    save_as(tmp_path / name, format)
    source = open_source(f"folder:{tmp_path}")
    assert (source.name(0), source.size(0)) == (name, (HEIGHT, WIDTH))
    assert source_notes(source) == []
    assert np.abs(source[0].image.mean((0, 1)) - (200, 30, 90)).max() < 6


def test_heif_is_read_by_itself(tmp_path: Path, monkeypatch):
    pytest.importorskip("pillow_heif", reason="pip install 'spatial_ssrl_jax[heif]'")
    assert reads_heif()
    save_as(tmp_path / "a.heic", "HEIF")
    reads_heif.cache_clear()
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    assert open_image((tmp_path / "a.heic").read_bytes()).shape == (HEIGHT, WIDTH, 3)


def test_unread_formats_are_counted_and_named(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(features, "check", lambda name: False)
    reads_heif.cache_clear()
    for name in ("a.heic", "b.HEIC", "c.avif"):
        (tmp_path / name).write_bytes(b"\0\0\0\x1cftypheic")
    with pytest.raises(UserError, match=r"\.heic images left out: 2.*pip install"):
        open_source(f"folder:{tmp_path}")
    save_image(tmp_path / "d.jpg")
    source = open_source(f"folder:{tmp_path}")
    assert [source.name(i) for i in range(len(source))] == ["d.jpg"]
    notes = source_notes(source)
    assert [note.split(": ", 1)[1] for note in notes] == [
        ".avif images left out: 1, for example c.avif; pip install -U pillow",
        ".heic images left out: 2, for example a.heic; pip install 'spatial_ssrl_jax[heif]'",
    ]
    with pytest.raises(BadImage, match=r"a\.heic: .*HEIF needs pip install"):
        open_image(tmp_path / "a.heic")
    reads_heif.cache_clear()

"""Depth files and masks of every kind: read as one plane, or refused in a sentence."""

import io
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.data import images
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.data.sources.depthmap import DepthTarget, read_depth
from tests.data.test_frames import RGB, frame_of
from tests.data.test_rgbd_layouts import save_units
from tests.data.test_sources import HEIGHT, WIDTH, check_ramp, ramp, save_depth, save_image

TARGET = DepthTarget((HEIGHT, WIDTH))


def pfm(values: np.ndarray, order: str = "<") -> bytes:
    scale = -1.0 if order == "<" else 1.0
    head = f"Pf\n{values.shape[1]} {values.shape[0]}\n{scale}\n".encode()
    return head + values[::-1].astype(f"{order}f4").tobytes()


def save_npz(path: Path, **arrays: np.ndarray) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


DEPTH_FILES: dict[str, tuple[Callable[[Path], object], float]] = {  # and the tolerance in metres
    "a.PNG": (lambda path: save_units(path, 1000), 6e-4),
    "a.tif": (lambda path: save_units(path, 1000), 6e-4),
    "b.tif": (lambda path: Image.fromarray(ramp()).save(path), 0),
    "c.TIFF": (lambda path: Image.fromarray(ramp()).save(path, compression="tiff_lzw"), 0),
    "a.npy": (lambda path: np.save(path, ramp()), 0),
    "a.npz": (lambda path: save_npz(path, depth=ramp(), other=ramp()[:2]), 0),
    "b.npz": (lambda path: save_npz(path, arr_0=ramp()), 0),
    "a.pfm": (lambda path: path.write_bytes(pfm(ramp())), 0),
    "b.pfm": (lambda path: path.write_bytes(pfm(ramp(), ">")), 0),
    "a.hdf5": (lambda path: frame_of(dataset=ramp())(path), 0),
    "b.h5": (lambda path: frame_of(depth=ramp(), other=RGB)(path), 0),
}


@pytest.mark.parametrize("name", DEPTH_FILES)
def test_depth_files(tmp_path: Path, monkeypatch, name: str):
    make, tolerance = DEPTH_FILES[name]
    make(tmp_path / name)
    check_ramp(read_depth(str(tmp_path / name), TARGET), tolerance)
    check_limit(tmp_path / name, monkeypatch)


def check_limit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of more pixels than is allowed is refused."""
    monkeypatch.setattr(images, "SOURCE_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(BadImage, match=rf"{path.name}: .* is more than 191 pixels"):
        read_depth(str(path), TARGET)


def write_exr(path: Path, **channels: np.ndarray) -> None:
    OpenEXR = pytest.importorskip("OpenEXR", reason="pip install 'spatial_ssrl_jax[exr]'")
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File(header, channels).write(str(path))


def test_exr_files(tmp_path: Path, monkeypatch):
    others = {"A": np.ones((HEIGHT, WIDTH), np.float32), "B": ramp() + 1}
    write_exr(tmp_path / "a.exr", Z=ramp(), **others)
    check_ramp(read_depth(str(tmp_path / "a.exr"), TARGET))
    write_exr(tmp_path / "b.exr", **others)
    with pytest.raises(BadImage, match=r"b\.exr: .*several \(A, B\)"):
        read_depth(str(tmp_path / "b.exr"), TARGET)
    content = (tmp_path / "a.exr").read_bytes()
    at = content.index(b"dataWindow\0box2i\0") + len(b"dataWindow\0box2i\0") + 4
    window = np.array([0, 0, WIDTH - 2, HEIGHT - 1], "<i4").tobytes()
    (tmp_path / "c.exr").write_bytes(content[:at] + window + content[at + 16 :])
    with pytest.raises(BadImage, match=r"c\.exr: holds a part of its picture"):
        read_depth(str(tmp_path / "c.exr"), TARGET)
    check_limit(tmp_path / "a.exr", monkeypatch)


def test_exr_without_its_library(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    (tmp_path / "a.exr").write_bytes(b"")
    with pytest.raises(UserError, match=r"pip install 'spatial_ssrl_jax\[exr\]'") as caught:
        read_depth(str(tmp_path / "a.exr"), TARGET)
    assert not isinstance(caught.value, BadImage)


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "several.h5": (lambda path: frame_of(a=ramp(), b=ramp())(path), r"several \(a, b\)"),
    "several.npz": (lambda path: save_npz(path, a=ramp(), b=ramp()), r"several \(a, b\)"),
    "none.npz": (lambda path: save_npz(path), "holds none"),
    "pickle.npz": (lambda path: save_npz(path, depth=np.array([[{}]])), "holds object"),
    "rgb.tif": (lambda path: save_image(path), "is RGB, not 16-bit grey"),
    "colour.pfm": (lambda path: path.write_bytes(b"PF\n2 2\n-1\n" + bytes(48)), "is no PFM"),
    "huge.pfm": (lambda path: path.write_bytes(b"Pf\n99999 99999\n-1\n"), "is more than"),
    "short.pfm": (lambda path: path.write_bytes(pfm(ramp())[:-9]), "cannot be read"),
    "scale.pfm": (lambda path: path.write_bytes(b"Pf\n2 2\n-.-\n" + bytes(16)), "cannot be read"),
    "cut.npz": (lambda path: path.write_bytes(b"PK\3\4" + bytes(40)), "cannot be read"),
    "empty.tif": (lambda path: path.write_bytes(b""), "not an image"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_depth_files_are_named(tmp_path: Path, name: str):
    make, reason = BAD_FILES[name]
    make(tmp_path / name)
    with pytest.raises(BadImage, match=rf"{name}: .*{reason}") as caught:
        read_depth(str(tmp_path / name), TARGET)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def huge_npz(path: Path) -> None:
    """A zipped array whose header promises 26.8 GiB."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<f4", "fortran_order": False, "shape": (120_000, 60_000)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("depth.npy", file.getvalue())


def test_an_npz_is_refused_by_its_header(tmp_path: Path):
    huge_npz(tmp_path / "a.npz")
    with pytest.raises(BadImage, match="120000x60000 is more than"):
        read_depth(str(tmp_path / "a.npz"), TARGET)


@pytest.mark.parametrize("mode", ["L", "1", "I;16"])
def test_a_mask_may_be_an_image(tmp_path: Path, mode: str):
    save_image(tmp_path / "a.webp")
    save_depth(tmp_path / "a_depth.npy", ramp() + 1)
    valid = np.ones((HEIGHT, WIDTH), np.uint8)
    valid[3:5] = 0
    mask = Image.fromarray(255 * valid)
    mask.convert(mode).save(tmp_path / "a_depth_mask.png")
    source = open_source(f"rgbd:{tmp_path}")
    assert [source.name(i) for i in range(len(source))] == ["a.webp"]
    np.testing.assert_array_equal(np.isnan(source[0].depth), valid == 0)

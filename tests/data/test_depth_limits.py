"""Depth files that ask for more than they may: refused by their headers, before they are read."""

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from spatial_ssrl_jax.common.errors import BadImage
from spatial_ssrl_jax.data import images
from spatial_ssrl_jax.data.images import SOURCE_PIXELS
from spatial_ssrl_jax.data.sources.depthmap import DepthTarget, read_depth
from spatial_ssrl_jax.data.sources.stored import StoredSource
from tests.data.test_images import png_of_size
from tests.data.test_sources import HEIGHT, WIDTH, check_ramp, ramp, save_depth, save_image

SIZE = (HEIGHT, WIDTH)
TARGET = DepthTarget(SIZE)
SIDES = (120_000, 60_000)  # 26.8 GiB of float32


def refused(path: Path, reason: str, mask: Path | None = None) -> None:
    """Refused in one sentence, for less memory than a thousandth of `SOURCE_PIXELS`."""
    tracemalloc.start()
    try:
        with pytest.raises(BadImage, match=f"{(mask or path).name}.*{reason}") as caught:
            read_depth(str(path), TARGET, mask and str(mask))
        assert tracemalloc.get_traced_memory()[1] < SOURCE_PIXELS / 100
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def npy_header(path: Path, shape: tuple[int, ...], dtype: str = "<f4") -> Path:
    """A `.npy` of a header and a few bytes."""
    with path.open("wb") as file:
        described = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, described)
        file.write(b"\0" * 64)
    return path


def h5_of(path: Path, **settings) -> Path:
    """An h5 whose data set `depth` has no values yet."""
    with h5py.File(path, "w") as file:
        file.create_dataset("depth", **settings)
    return path


# (makes the file, why it is refused)
TOO_LARGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a.npy": (lambda path: npy_header(path, SIDES), "120000x60000 is more than 67,108,864 pixels"),
    "b.npy": (lambda path: npy_header(path, (1, *SIDES)), "1x120000x60000 is more than"),
    "c.npy": (lambda path: npy_header(path, (-1, WIDTH)), r"holds float32 \[-1, 16\]; expected"),
    "d.npy": (lambda path: npy_header(path, (2, 2), "(9000,)<f4"), "expected"),
    "e.h5": (
        lambda path: h5_of(path, shape=SIDES, dtype="f4", chunks=(64, 64)),
        "120000x60000 is more than 67,108,864 pixels",
    ),
    "f.h5": (  # a chunk is read whole, however small the data set is
        lambda path: h5_of(path, shape=SIZE, maxshape=(None,) * 2, chunks=(9000,) * 2, dtype="f4"),
        "9000x9000 is more than",
    ),
    "g.h5": (lambda path: h5_of(path, shape=SIZE, dtype=("f4", (99_999,))), "expected numbers"),
    "h.h5": (lambda path: h5_of(path, dtype="f4"), "expected numbers"),  # no shape at all
    "i.png": (lambda path: path.write_bytes(png_of_size(13_000, 13_000)), "RGB, not 16-bit grey"),
    "j.png": (
        lambda path: Image.new("I;16", (8193, 8192)).save(path),
        "8193x8192 is more than 67,108,864 pixels",
    ),
    "k.png": (lambda path: path.write_bytes(png_of_size(20_000, 20_000)), "larger than"),
}


@pytest.mark.parametrize("name", TOO_LARGE)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_large_by_the_header(tmp_path: Path, name: str):
    make, reason = TOO_LARGE[name]
    make(tmp_path / name)
    refused(tmp_path / name, reason)


def test_a_mask_has_the_same_limit(tmp_path: Path):
    save_depth(tmp_path / "d.npy", ramp())
    refused(tmp_path / "d.npy", "is more than", npy_header(tmp_path / "mask.npy", SIDES))
    os.mkfifo(tmp_path / "pipe.npy")
    refused(tmp_path / "d.npy", "is no file", tmp_path / "pipe.npy")


@pytest.mark.parametrize("ending", [".png", ".npy", ".h5"])
def test_the_limit_itself_is_allowed(tmp_path: Path, monkeypatch, ending: str):
    path = tmp_path / f"d{ending}"
    save_depth(path, ramp())
    monkeypatch.setattr(images, "SOURCE_PIXELS", HEIGHT * WIDTH)
    check_ramp(read_depth(str(path), TARGET), 6e-4)
    monkeypatch.setattr(images, "SOURCE_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(BadImage, match=f"d{ending}: .* is more than 191 pixels"):
        read_depth(str(path), TARGET)


def test_other_versions_of_npy_are_read(tmp_path: Path):
    for version in ((2, 0), (3, 0)):
        with (tmp_path / "d.npy").open("wb") as file:
            np.lib.format.write_array(file, np.asfortranarray(ramp()), version)
        check_ramp(read_depth(str(tmp_path / "d.npy"), TARGET))


def test_what_is_no_plane_of_numbers_is_not_read(tmp_path: Path):
    np.savez(tmp_path / "a.npz", ramp())
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    refused(tmp_path / "a.npy", "cannot be read as depth")
    for name, kind in (
        ("b.h5", h5py.string_dtype()),
        ("c.h5", np.dtype([("z", "f4")])),
        ("d.h5", h5py.vlen_dtype("f4")),
        ("e.h5", h5py.ref_dtype),
    ):
        refused(h5_of(tmp_path / name, shape=SIZE, dtype=kind), "expected numbers")


# ------------------------------------------------------------ h5 files that read other files


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file outside, with what would be a good depth."""
    folder = tmp_path / "secret"
    folder.mkdir()
    save_depth(folder / "s.h5", ramp())
    (folder / "s.raw").write_bytes(ramp().tobytes())
    return folder


def external_link(file: h5py.File, secret: Path) -> None:
    file["depth"] = h5py.ExternalLink(str(secret / "s.h5"), "depth")


def link_beside_depth(file: h5py.File, secret: Path) -> None:
    file["depth"] = ramp()
    file["more/other"] = h5py.ExternalLink(str(secret / "s.h5"), "/")


def soft_link_through_a_link(file: h5py.File, secret: Path) -> None:
    file["more/other"] = h5py.ExternalLink(str(secret / "s.h5"), "/")
    file["depth"] = h5py.SoftLink("/more/other/depth")


def external_storage(file: h5py.File, secret: Path) -> None:
    file.create_dataset("depth", SIZE, "f4", external=[(str(secret / "s.raw"), 0, 768)])


def virtual(file: h5py.File, secret: Path) -> None:
    layout = h5py.VirtualLayout(SIZE, "f4")
    layout[...] = h5py.VirtualSource(str(secret / "s.h5"), "depth", SIZE)
    file.create_virtual_dataset("depth", layout)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (external_link, "has a link to another file"),
        (link_beside_depth, "has a link to another file"),
        (soft_link_through_a_link, "has a link to another file"),
        (external_storage, "keeps its values in other files"),
        (virtual, "keeps its values in other files"),
    ],
)
def test_an_h5_reads_no_other_file(tmp_path: Path, secret: Path, make, reason: str):
    with h5py.File(tmp_path / "d.h5", "w") as file:
        make(file, secret)
    refused(tmp_path / "d.h5", reason)


def test_soft_links_inside_a_file_are_followed(tmp_path: Path):
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["more/values"], file["circle"] = ramp(), h5py.SoftLink("/circle")
        file["depth"] = h5py.SoftLink("/more/values")
        file["more/up"] = file["/"]
    check_ramp(read_depth(str(tmp_path / "d.h5"), TARGET))
    with h5py.File(tmp_path / "d.h5", "a") as file:
        del file["depth"]
    refused(tmp_path / "d.h5", "cannot be read as depth")  # for the link to itself


# ----------------------------------------------------------------------------- TFDS records


def stored(tmp_path: Path, depth: bytes) -> StoredSource:
    """One record whose depth is an image of its own."""
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "depth": tfds.features.Image(shape=(None, None, 1)),
        }
    )
    save_image(tmp_path / "a.png")
    row = {"image": (tmp_path / "a.png").read_bytes(), "depth": depth}
    record = features.serialize_example(row)
    return StoredSource("tfds:x", "x", [record], features, ())


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_depth_in_a_record(tmp_path: Path):
    Image.fromarray(np.full(SIZE, 7, np.uint8)).save(tmp_path / "d.png")
    depth = stored(tmp_path, (tmp_path / "d.png").read_bytes())[0].depth
    np.testing.assert_array_equal(depth, np.full(SIZE, 7, np.float32))
    for content, reason in (
        (png_of_size(13_000, 13_000), "the depth of x/00000000: 13000x13000 is more than"),
        (b"no image", "the depth of x/00000000: not an image"),
    ):
        with pytest.raises(BadImage, match=reason):
            stored(tmp_path, content)[0]


def test_a_damaged_record_is_named(tmp_path: Path):
    source = stored(tmp_path, b"")
    source._rows = [b"no record"]
    with pytest.raises(BadImage, match="x/00000000: cannot be decoded"):
        source.size(0)

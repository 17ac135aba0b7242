"""Sources over files: listing, names, depth in its many forms, and bad files named."""

import os
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.data.sources import OPENERS, open_source
from spatial_ssrl_jax.data.sources.depthmap import DepthTarget, read_depth
from tests.conftest import ROOT

SHARED = ROOT.parent / "shared"
HEIGHT, WIDTH = 12, 16


def save_image(path: Path, size=(HEIGHT, WIDTH)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(len(path.name)).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(values).save(path)


def save_depth(path: Path, metres: np.ndarray, name: str = "depth") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        Image.fromarray(np.rint(1000 * metres).astype(np.uint16)).save(path)
    elif path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            file[name] = metres
    else:
        np.save(path, metres)


def ramp(size=(HEIGHT, WIDTH)) -> np.ndarray:
    """Depths from 1 to 5 m with one invalid pixel at [0, 0]."""
    depth = np.linspace(1, 5, size[0] * size[1], dtype=np.float32).reshape(size)
    depth[0, 0] = 0
    return depth


def check_ramp(depth: np.ndarray, tolerance: float = 0.0) -> None:
    assert depth.shape == (HEIGHT, WIDTH) and depth.dtype == np.float32
    assert np.isnan(depth[0, 0]) and np.isnan(depth).sum() == 1
    np.testing.assert_allclose(depth.ravel()[1:], ramp().ravel()[1:], atol=tolerance)


# ------------------------------------------------------------------------------ SPECs


@pytest.mark.parametrize("spec, nearest", [("folders:/x", "folder"), ("Nyu:/x", "nyu"), ("", "")])
def test_unknown_kinds_name_the_nearest_and_all(spec, nearest):
    with pytest.raises(UserError, match="unknown kind") as caught:
        open_source(spec)
    assert nearest in str(caught.value).split("Kinds:")[0]
    assert all(kind in str(caught.value).split("Kinds:")[1] for kind in OPENERS)


def test_a_bare_path_is_not_taken_for_a_kind(tmp_path):
    with pytest.raises(UserError, match=f"did you mean 'folder:{tmp_path}'"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("kind", ["folder", "rgbd", "diode", "megadepth", "nyu"])
def test_missing_and_empty_folders(tmp_path, kind):
    (tmp_path / "notes.txt").write_text("no image")
    cases = {
        f"{kind}:{tmp_path}/gone": "there is no such folder",
        f"{kind}:{tmp_path}/notes.txt": "is a file",
        f"{kind}:{tmp_path}": "found no image",
        f"{kind}:": "path is missing",
    }
    for spec, reason in cases.items():
        with pytest.raises(UserError, match=reason) as caught:
            open_source(spec)
        message = str(caught.value)
        assert spec in message and "expected" in message and "\n" not in message
        assert not isinstance(caught.value, BadImage)


# ---------------------------------------------------------------------------- folder


def test_folder_lists_recursively_and_sorted(tmp_path):
    names = ["b.JPG", "a/z.png", "a/b/c.webp", "c.bmp", "a.jpeg"]
    for name in names:
        save_image(tmp_path / name)
    for name in ("readme.txt", "a/x.npy", ".hidden.png", ".thumbs/t.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    spec = f"folder:{tmp_path}"
    source = pickle.loads(pickle.dumps(open_source(spec)))
    assert [source.name(i) for i in range(len(source))] == sorted(names)
    assert (source.spec, source.has_depth) == (spec, False)
    record = source[1]
    assert record.image.shape == (HEIGHT, WIDTH, 3) and record.image.dtype == np.uint8
    assert record.depth is None
    assert (record.name, record.spec) == (source.name(1), spec)
    assert record.path == str(tmp_path / record.name)
    with pytest.raises(IndexError):
        source[len(names)]


def test_folder_follows_links_but_not_round_in_circles(tmp_path):
    save_image(tmp_path / "real" / "a.png")
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "data" / "link")
    os.symlink(tmp_path / "data", tmp_path / "data" / "circle")
    source = open_source(f"folder:{tmp_path}/data")
    assert [source.name(i) for i in range(len(source))] == ["link/a.png"]


def test_folder_reads_no_pixels_until_access(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    source = open_source(f"folder:{tmp_path}")
    assert source.name(0) == "broken.jpg"
    with pytest.raises(BadImage, match=str(tmp_path / "broken.jpg")):
        source[0]


# ------------------------------------------------------------------------------ rgbd


@pytest.mark.parametrize("ending, tolerance", [(".png", 6e-4), (".npy", 0.0), (".h5", 0.0)])
@pytest.mark.parametrize("image", ["a.jpg", "room/a.png"])
def test_rgbd_depth_files(tmp_path, image, ending, tolerance):
    save_image(tmp_path / image)
    save_depth(tmp_path / image.replace(Path(image).suffix, f"_depth{ending}"), ramp())
    source = pickle.loads(pickle.dumps(open_source(f"rgbd:{tmp_path}")))
    assert (len(source), source.has_depth, source.name(0)) == (1, True, image)
    check_ramp(source[0].depth, tolerance)


def test_rgbd_h5_takes_depth_else_the_only_data_set(tmp_path):
    save_image(tmp_path / "a.png")
    save_depth(tmp_path / "a_depth.h5", ramp(), name="other")
    check_ramp(open_source(f"rgbd:{tmp_path}")[0].depth)
    with h5py.File(tmp_path / "a_depth.h5", "a") as file:
        file["another"] = np.ones((2, 2))
    with pytest.raises(BadImage, match=r"named 'depth'; it holds several \(another, other\)"):
        open_source(f"rgbd:{tmp_path}")[0]
    with h5py.File(tmp_path / "a_depth.h5", "a") as file:
        file["depth"] = ramp()
        file["other"][...] = 9
    check_ramp(open_source(f"rgbd:{tmp_path}")[0].depth)


def test_rgbd_mask(tmp_path):
    save_image(tmp_path / "a.png")
    save_depth(tmp_path / "a_depth.npy", ramp() + 1)
    mask = np.ones((HEIGHT, WIDTH, 1), bool)
    mask[3:5] = False
    np.save(tmp_path / "a_depth_mask.npy", mask)
    depth = open_source(f"rgbd:{tmp_path}")[0].depth
    np.testing.assert_array_equal(np.isnan(depth), ~mask[..., 0])
    np.save(tmp_path / "a_depth_mask.npy", mask[1:])
    with pytest.raises(BadImage, match="a_depth_mask.npy"):
        open_source(f"rgbd:{tmp_path}")[0]


def test_rgbd_a_image_without_depth_is_named(tmp_path):
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "b.jpg")
    with pytest.raises(UserError, match=r"2 images below .*a\.png has no a_depth\.png"):
        open_source(f"rgbd:{tmp_path}")
    save_depth(tmp_path / "a_depth.png", ramp())
    source = open_source(f"rgbd:{tmp_path}")
    assert [source.name(i) for i in range(2)] == ["a.png", "b.jpg"]
    check_ramp(source[0].depth, 6e-4)
    with pytest.raises(BadImage, match=r"b\.jpg: has no depth.*b_depth\.png or"):
        source[1]


# ------------------------------------------------------------------------- depth maps


def test_invalid_values_become_nan(tmp_path):
    depth = ramp()
    depth[1, :5] = [np.nan, np.inf, -np.inf, -1, 0]
    np.save(tmp_path / "d.npy", depth)
    read = read_depth(str(tmp_path / "d.npy"), DepthTarget((HEIGHT, WIDTH)))
    assert np.isnan(read[1, :5]).all() and np.isnan(read).sum() == 6
    assert np.nanmin(read) > 0


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH, 1), (1, HEIGHT, WIDTH)])
def test_a_channel_of_one_is_dropped(tmp_path, shape):
    np.save(tmp_path / "d.npy", ramp().astype(np.float64).reshape(shape))
    check_ramp(read_depth(str(tmp_path / "d.npy"), DepthTarget((HEIGHT, WIDTH))))


def test_other_sizes_are_resampled_to_the_nearest(tmp_path):
    values = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    np.save(tmp_path / "d.npy", values)
    larger = read_depth(str(tmp_path / "d.npy"), DepthTarget((4, 6)))
    np.testing.assert_array_equal(larger, values.repeat(2, 0).repeat(2, 1))
    np.save(tmp_path / "d.npy", values.repeat(3, 0).repeat(3, 1))
    np.testing.assert_array_equal(read_depth(str(tmp_path / "d.npy"), DepthTarget((2, 3))), values)


def test_the_aspect_may_differ_by_two_percent(tmp_path):
    np.save(tmp_path / "d.npy", np.ones((100, 202), np.float32))
    assert read_depth(str(tmp_path / "d.npy"), DepthTarget((50, 100))).shape == (50, 100)
    np.save(tmp_path / "d.npy", np.ones((100, 206), np.float32))
    with pytest.raises(BadImage, match=r"d\.npy.*206x100.*100x50"):
        read_depth(str(tmp_path / "d.npy"), DepthTarget((50, 100)))


def bad_depths(folder: Path) -> dict[str, str]:
    """Bad depth files by name, and a part of each one's message."""
    save_depth(folder / "zero.npy", np.zeros((HEIGHT, WIDTH), np.float32))
    save_depth(folder / "nan.npy", np.full((HEIGHT, WIDTH), np.nan, np.float32))
    save_depth(folder / "turned.npy", ramp((WIDTH, HEIGHT)))
    save_depth(folder / "rgb.npy", np.ones((HEIGHT, WIDTH, 3), np.float32))
    save_depth(folder / "complex.npy", np.ones((HEIGHT, WIDTH), np.complex64))
    save_depth(folder / "none.npy", np.ones((0, 0), np.float32))
    np.save(folder / "pickled.npy", np.array([{}], object), allow_pickle=True)
    Image.fromarray(np.ones((HEIGHT, WIDTH), np.uint8)).save(folder / "8bit.png")
    h5py.File(folder / "nothing.h5", "w").close()
    for name in ("broken.npy", "broken.png", "broken.h5"):
        (folder / name).write_bytes(b"\x93NUMPY broken")
    return {
        "zero.npy": "no pixel with a valid depth",
        "nan.npy": "no pixel with a valid depth",
        "turned.npy": "not that of its image",
        "rgb.npy": r"expected numbers \[H, W\]",
        "complex.npy": "expected numbers",
        "none.npy": "expected numbers",
        "pickled.npy": "holds object .*expected numbers",
        "8bit.png": "not 16-bit grey",
        "nothing.h5": "one data set named 'depth'; it holds none",
        "broken.npy": "cannot be read as depth",
        "broken.png": "not an image",
        "broken.h5": "cannot be read as depth",
        "gone.npy": "there is no such file",
    }


def test_bad_depth_files_are_named(tmp_path):
    for name, reason in bad_depths(tmp_path).items():
        with pytest.raises(BadImage, match=f"{name}.*{reason}") as caught:
            read_depth(str(tmp_path / name), DepthTarget((HEIGHT, WIDTH)))
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


# -------------------------------------------------------------- DIODE, MegaDepth, NYU


def test_diode_needs_its_mask(tmp_path):
    save_image(tmp_path / "s" / "a.png")
    save_depth(tmp_path / "s" / "a_depth.npy", ramp()[..., None])
    source = open_source(f"diode:{tmp_path}")
    with pytest.raises(BadImage, match="a_depth_mask.npy: there is no such file"):
        source[0]
    mask = np.ones((HEIGHT, WIDTH), np.float32)
    mask[5] = 0
    np.save(tmp_path / "s" / "a_depth_mask.npy", mask)
    depth = source[0].depth
    assert np.isnan(depth[5]).all() and np.isnan(depth).sum() == WIDTH + 1


def test_megadepth_layout_and_ordinal_maps(tmp_path):
    scene = tmp_path / "0001" / "dense0"
    for name in ("a", "b", "c"):
        save_image(scene / "imgs" / f"{name}.jpg")
    save_image(scene / "elsewhere" / "d.jpg")
    save_depth(scene / "depths" / "a.h5", ramp())
    ordinal = ramp()
    ordinal[4] = -1
    save_depth(scene / "depths" / "b.h5", ordinal)
    source = pickle.loads(pickle.dumps(open_source(f"megadepth:{tmp_path}")))
    names = [source.name(i) for i in range(len(source))]
    assert names == [f"0001/dense0/imgs/{n}.jpg" for n in "abc"]
    check_ramp(source[0].depth)
    with pytest.raises(BadImage, match=r"b\.h5: has negative values"):
        source[1]
    with pytest.raises(BadImage, match=r"c\.jpg: has no depth; expected c\.h5 in .*depths"):
        source[2]
    check_ramp(open_source(f"megadepth:{scene / 'imgs'}")[0].depth)


def test_nyu_pairs_by_number(tmp_path):
    for number in ("00001", "00002"):
        save_image(tmp_path / "room" / f"rgb_{number}.jpg")
        save_depth(tmp_path / "room" / f"sync_depth_{number}.png", ramp())
    source = pickle.loads(pickle.dumps(open_source(f"nyu:{tmp_path}")))
    assert [source.name(i) for i in range(2)] == ["room/rgb_00001.jpg", "room/rgb_00002.jpg"]
    assert len(source) == 2
    check_ramp(source[1].depth, 6e-4)
    os.remove(tmp_path / "room" / "sync_depth_00002.png")
    with pytest.raises(BadImage, match=r"rgb_00002\.jpg: has no depth; expected sync_depth_00002"):
        source[1]


# -------------------------------------------------------------------------- real data


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is missing")
@pytest.mark.parametrize(
    "spec, count, shape, invalid, bounds",
    [  # fraction of invalid pixels, and the range of valid depth
        ("diode:rgbd/diode", 1, (768, 1024), (0.05, 0.6), (0.2, 300)),
        ("rgbd:rgbd/diode", 1, (768, 1024), (0.05, 0.6), (0.2, 300)),
        ("megadepth:rgbd/megadepth", 1, (1064, 1600), (0.33, 0.35), (1e-3, 800)),
        ("nyu:rgbd/nyu_depth_v2", 2, (480, 640), (0.2, 0.3), (0.4, 10)),
    ],
)
def test_real_rgbd(spec, count, shape, invalid, bounds):
    kind, folder = spec.split(":")
    source = open_source(f"{kind}:{SHARED / folder}")
    assert len(source) == count and source.has_depth
    for i in range(count):
        record = source[i]
        assert record.image.shape == (*shape, 3) and record.image.dtype == np.uint8
        assert record.depth.shape == shape and record.depth.dtype == np.float32
        assert not np.isinf(record.depth).any()
        assert invalid[0] < np.isnan(record.depth).mean() < invalid[1]
        assert bounds[0] < np.nanmin(record.depth) < np.nanmax(record.depth) < bounds[1]
        assert os.path.isfile(record.path) and record.path.endswith(record.name)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is missing")
def test_real_photos():
    source = open_source(f"folder:{SHARED / 'photos'}")
    assert [source.name(i) for i in range(len(source))] == [f"eg{i}.jpg" for i in range(1, 5)]
    assert [source[i].image.shape for i in range(4)] == [
        (500, 375, 3),
        (427, 640, 3),
        (426, 640, 3),
        (480, 640, 3),
    ]

"""Frames in HDF5 files: many in one `.mat`, and one in an `.h5`."""

import pickle
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from spatial_ssrl_jax import prepare
from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.data import images
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.data.sources.mixture import source_notes
from tests.data.test_rgbd_layouts import write
from tests.data.test_sources import HEIGHT, WIDTH, check_ramp, ramp, save_image


def write_labeled(path: Path, frames: int = 3) -> np.ndarray:
    """A `.mat` as NYU's: frame i has depth i + the ramp; returns the images."""
    pictures = np.random.default_rng(0).integers(0, 256, (frames, HEIGHT, WIDTH, 3), np.uint8)
    depths = np.stack([np.where(ramp() > 0, ramp() + i, 0) for i in range(frames)])
    with h5py.File(path, "w") as file:
        file["images"] = pictures.transpose(0, 3, 2, 1)
        file["depths"] = depths.transpose(0, 2, 1)
        file["more/names"] = [b"kitchen"]
    return pictures


@pytest.mark.parametrize("spec", ["rgbd:{0}", "rgbd:{0}/nyu.mat"])
def test_frames_of_a_labeled_file(tmp_path: Path, spec: str):
    pictures = write_labeled(tmp_path / "nyu.mat")
    (tmp_path / "splits.mat").write_bytes(b"MATLAB 5.0 MAT-file")  # is no HDF5
    source = pickle.loads(pickle.dumps(open_source(spec.format(tmp_path))))
    assert (len(source), source.has_depth) == (3, True)
    assert source.inputs == (str(tmp_path), str(tmp_path / "nyu.mat"))
    assert [source.name(i) for i in range(3)] == [f"nyu.mat#{i}" for i in range(3)]
    for i in range(3):
        record = source[i]
        np.testing.assert_array_equal(record.image, pictures[i])
        assert source.size(i) == record.image.shape[:2] == (HEIGHT, WIDTH)
        check_ramp(record.depth - i, 1e-6)
    with pytest.raises(IndexError):
        source[3]


def test_hdf5_files_without_frames_are_named(tmp_path: Path):
    (tmp_path / "splits.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    for spec in (f"rgbd:{tmp_path}", f"rgbd:{tmp_path}/splits.mat"):
        with pytest.raises(UserError, match=r"HDF5 files without frames .*splits\.mat"):
            open_source(spec)
    save_image(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"a\.jpg has no a_depth\.png; HDF5 .*: 1, for example"):
        open_source(f"rgbd:{tmp_path}")


def test_frames_of_several_files_follow_each_other(tmp_path: Path):
    write_labeled(tmp_path / "a.mat", 2)
    pictures = write_labeled(tmp_path / "b.MAT", 1)
    source = open_source(f"rgbd:{tmp_path}")
    assert [source.name(i) for i in range(3)] == ["a.mat#0", "a.mat#1", "b.MAT#0"]
    np.testing.assert_array_equal(source[2].image, pictures[0])
    before = source.fingerprint()
    write_labeled(tmp_path / "a.mat", 3)
    assert open_source(f"rgbd:{tmp_path}").fingerprint() != before


@pytest.mark.parametrize("channels_last", [False, True])
def test_files_of_one_frame(tmp_path: Path, channels_last: bool):
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    for name in ("room/00001.h5", "room/00002.h5"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with h5py.File(tmp_path / name, "w") as file:
            file["rgb"] = image if channels_last else image.transpose(2, 0, 1)
            file["depth"] = ramp()
    source = open_source(f"rgbd:{tmp_path}")
    assert [source.name(i) for i in range(len(source))] == ["room/00001.h5", "room/00002.h5"]
    np.testing.assert_array_equal(source[1].image, image)
    assert source.size(1) == (HEIGHT, WIDTH)
    check_ramp(source[1].depth)


def frame_of(**sets: np.ndarray) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with h5py.File(path, "w") as file:
            for name, values in sets.items():
                file[name] = values

    return write


RGB = np.zeros((3, HEIGHT, WIDTH), np.uint8)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (frame_of(rgb=RGB.astype(np.float32), depth=ramp()), "'rgb' holds float32.*uint8 RGB"),
        (frame_of(rgb=RGB[:2], depth=ramp()), r"'rgb' holds uint8 \[2, 12, 16\]"),
        (frame_of(rgb=RGB, depth=ramp()[:, :, None].repeat(3, 2)), r"expected numbers \[H, W\]"),
        (frame_of(rgb=RGB, depth=ramp((HEIGHT, HEIGHT))), "not that of its image"),
        (frame_of(rgb=RGB, depth=0 * ramp()), "no pixel with a valid depth"),
        (frame_of(rgb=RGB), "no data set 'depth'"),
        (lambda path: path.write_bytes(b"\x89HDF"), "cannot be read"),
    ],
)
def test_bad_frames_are_named(tmp_path: Path, make: Callable[[Path], None], reason: str):
    frame_of(rgb=RGB, depth=ramp())(tmp_path / "a.h5")
    make(tmp_path / "b.h5")
    source = open_source(f"rgbd:{tmp_path}")
    with pytest.raises(BadImage, match=rf"b\.h5: .*{reason}") as caught:
        source[1]
    assert "\n" not in str(caught.value)


def test_frames_of_integers_and_of_too_many_pixels(tmp_path: Path, monkeypatch):
    values = np.rint(100 * ramp()).astype(np.uint16)
    values[2] = 65535
    frame_of(rgb=RGB, depth=values)(tmp_path / "a.h5")
    frame_of(rgb=RGB, depth=ramp()[::2, ::2])(tmp_path / "b.h5")
    source = open_source(f"rgbd:{tmp_path}")
    assert np.isnan(source[0].depth[2]).all() and np.isnan(source[0].depth).sum() == WIDTH + 1
    monkeypatch.setattr(images, "SOURCE_PIXELS", HEIGHT * WIDTH - 1)
    for read in (lambda: source[1], lambda: source.size(1)):
        with pytest.raises(BadImage, match=r"b\.h5: 12x16 is more than 191 pixels"):
            read()


def test_frames_beside_images_are_left_out_and_counted(tmp_path: Path):
    write(tmp_path, {"a.jpg": None, "b.jpg": None, "b_depth.png": 1000})
    frame_of(rgb=RGB, depth=ramp())(tmp_path / "c.h5")
    frame_of(depth=ramp())(tmp_path / "a_depth.h5")  # of an image, which has no frames
    source = open_source(f"rgbd:{tmp_path}")
    assert len(source) == 2
    assert source_notes(source) == [
        f"rgbd:{tmp_path}: HDF5 files of frames beside images left out: 1, for example c.h5"
    ]


@pytest.mark.parametrize("make", [write_labeled, frame_of(rgb=RGB, depth=ramp())])
def test_frames_are_packed_as_they_are(tmp_path: Path, capsys, make):
    (tmp_path / "src").mkdir()
    make(tmp_path / ("src/a.mat" if make is write_labeled else "src/a.h5"))
    source = open_source(f"rgbd:{tmp_path}/src")
    prepare.main(["rgbd", f"{tmp_path}/src", f"{tmp_path}/dst"])
    packed = open_source(f"tfds:ssrl_pictures/rgbd@{tmp_path}/dst")
    assert len(packed) == len(source) > 0
    for i in range(len(source)):
        np.testing.assert_array_equal(packed[i].image, source[i].image)
        np.testing.assert_array_equal(packed[i].depth, source[i].depth)
        assert packed[i].path == source[i].name

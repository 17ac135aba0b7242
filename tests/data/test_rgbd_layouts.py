"""`rgbd:` over the layouts of RGB-D data sets, and their depth files of every kind."""

import pickle
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from spatial_ssrl_jax import prepare
from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.data.sources import layouts, open_source
from spatial_ssrl_jax.data.sources.depthmap import DepthTarget
from spatial_ssrl_jax.data.sources.layouts import OWN, find_pairs
from spatial_ssrl_jax.data.sources.listing import Listing
from spatial_ssrl_jax.data.sources.mixture import source_notes
from tests.data.test_sources import HEIGHT, WIDTH, check_ramp, ramp, save_image

TARGET = DepthTarget((HEIGHT, WIDTH))


def save_units(path: Path, per_metre: float, metres: np.ndarray | None = None) -> None:
    """Depth as 16-bit values of a unit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.rint(per_metre * (ramp() if metres is None else metres)).astype(np.uint16)
    Image.fromarray(values).save(path)


def write(folder: Path, files: dict[str, float | None]) -> None:
    """Files by name: an image, or a depth with so many units a metre."""
    for name, per_metre in files.items():
        if per_metre is None:
            save_image(folder / name)
        else:
            save_units(folder / name, per_metre)


# (files, with units a metre where they hold depth; what is paired)
LAYOUTS: dict[str, tuple[dict[str, float | None], dict[str, str]]] = {
    OWN: (
        {"A.JPG": None, "A_depth.PNG": 1000, "room/b.webp": None, "room/b_depth.tiff": 1000},
        {"A.JPG": "A_depth.PNG", "room/b.webp": "room/b_depth.tiff"},
    ),
    "TUM RGB-D": (
        {
            "fr1/rgb/1305031102.175304.png": None,
            "fr1/rgb/1305031102.211214.png": None,
            "fr1/rgb/1305031103.000000.png": None,  # too late for any depth
            "fr1/depth/1305031102.160407.png": 5000,
            "fr1/depth/1305031102.194330.png": 5000,
            "fr1/depth/1305031102.226738.png": 5000,
        },
        {
            "fr1/rgb/1305031102.175304.png": "fr1/depth/1305031102.160407.png",
            "fr1/rgb/1305031102.211214.png": "fr1/depth/1305031102.226738.png",
        },
    ),
    "ScanNet or ARKitScenes": (
        {
            "scene0000_00/color/0.jpg": None,
            "scene0000_00/color/1.jpg": None,
            "scene0000_00/depth/0.png": 1000,
            "scene0000_00/label/0.png": None,
            "scene0000_00/depth_rgb/0.png": None,
            "nerf/images/1.jpg": None,
            "nerf/depths/1.png": 1000,
            "kinect/left/1.png": None,
            "kinect/left_depth/1.png": 1000,
            "41048190/lowres_wide/41048190_3418.817.png": None,
            "41048190/lowres_depth/41048190_3418.817.png": 1000,
            "41048190/wide/41048190_3418.817.png": None,
            "41048190/highres_depth/41048190_3418.817.png": 1000,
            "41048190/confidence/41048190_3418.817.png": None,
            "P001/image_left/000000_left.png": None,
            "P001/depth_left/000000_left_depth.png": 1000,
            "P001/depth_right/000000_left_depth.png": 1000,
        },
        {
            "kinect/left/1.png": "kinect/left_depth/1.png",
            "nerf/images/1.jpg": "nerf/depths/1.png",
            "scene0000_00/color/0.jpg": "scene0000_00/depth/0.png",
            "41048190/lowres_wide/41048190_3418.817.png": (
                "41048190/lowres_depth/41048190_3418.817.png"
            ),
            "41048190/wide/41048190_3418.817.png": "41048190/highres_depth/41048190_3418.817.png",
            "P001/image_left/000000_left.png": "P001/depth_left/000000_left_depth.png",
        },
    ),
    "7-Scenes": (
        {
            "seq-01/frame-000000.color.png": None,
            "seq-01/frame-000000.depth.png": 1000,
            "seq-01/frame-000001.color.png": None,
            "seq-01/frame-000002.depth.png": 1000,
            "lab/rgb_7.JPG": None,
            "lab/depth_7.PNG": 1000,
            "lab/8.jpg": None,
            "lab/8-depth.png": 1000,
            "lab/8-depth.rgb.png": 1000,
        },
        {
            "seq-01/frame-000000.color.png": "seq-01/frame-000000.depth.png",
            "lab/8.jpg": "lab/8-depth.png",
            "lab/rgb_7.JPG": "lab/depth_7.PNG",
        },
    ),
    "KITTI depth": (
        {
            "val/image/2011_09_26_drive_0002_sync_image_0000000005_image_02.png": None,
            "val/groundtruth_depth/"
            "2011_09_26_drive_0002_sync_groundtruth_depth_0000000005_image_02.png": 256,
            "raw/2011_09_26/2011_09_26_drive_0001_sync/image_02/data/0000000004.png": None,
            "raw/2011_09_26/2011_09_26_drive_0001_sync/image_02/data/0000000005.png": None,
            "raw/2011_09_26/2011_09_26_drive_0001_sync/image_03/data/0000000005.png": None,
            "train/2011_09_26_drive_0001_sync/proj_depth/groundtruth/image_02/0000000005.png": 256,
            "train/2011_09_26_drive_0001_sync/proj_depth/velodyne_raw/image_03/0000000005.png": 256,
        },
        {
            "raw/2011_09_26/2011_09_26_drive_0001_sync/image_02/data/0000000005.png": (
                "train/2011_09_26_drive_0001_sync/proj_depth/groundtruth/image_02/0000000005.png"
            ),
            "val/image/2011_09_26_drive_0002_sync_image_0000000005_image_02.png": (
                "val/groundtruth_depth/"
                "2011_09_26_drive_0002_sync_groundtruth_depth_0000000005_image_02.png"
            ),
        },
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_recognised(tmp_path: Path, name: str):
    files, expected = LAYOUTS[name]
    write(tmp_path, files)
    listing = Listing(str(tmp_path), sorted(files))
    found = find_pairs(listing)
    assert list(found) == [name]
    assert {pair.image: pair.depth for pair in found[name]} == expected
    source = pickle.loads(pickle.dumps(open_source(f"rgbd:{tmp_path}")))
    assert [source.name(i) for i in range(len(source))] == sorted(expected)
    for i in range(len(source)):
        check_ramp(source[i].depth, 2e-3)  # of a metre, in the layout's own unit


def test_tum_associations_pair_any_names(tmp_path: Path):
    write(tmp_path, {"rgb/0.png": None, "rgb/1.png": None, "rgb/7.jpg": None})
    write(tmp_path, {"depth/0.png": 5000, "depth/1.png": 5000})
    (tmp_path / "associations.txt").write_text(
        "# depth, then rgb\n0 depth/1.png 0 rgb/0.png\n1 ./rgb/1.png 1 depth/0.png\n"
        "2 rgb/gone.png 2 depth/0.png\n3 ../rgb/0.png 3 depth/0.png\n\nx\n",
    )
    source = open_source(f"rgbd:{tmp_path}")
    pairs = find_pairs(Listing(str(tmp_path), sorted(all_files(tmp_path))))["TUM RGB-D"]
    assert [(p.image, p.depth) for p in pairs] == [
        ("rgb/0.png", "depth/1.png"),
        ("rgb/1.png", "depth/0.png"),
    ]
    check_ramp(source[0].depth, 1e-3)
    # Without the file these are folders with the same names, in millimetres.
    (tmp_path / "associations.txt").unlink()
    assert list(find_pairs(Listing(str(tmp_path), sorted(all_files(tmp_path))))) == [
        "ScanNet or ARKitScenes"
    ]


def all_files(folder: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]


@pytest.mark.parametrize("depths", ["depth", "depth_bfx"])
def test_sun_rgbd_has_rotated_bits(tmp_path: Path, depths: str):
    scene = tmp_path / "kv2/kinect2data/000002"
    metres = ramp()
    metres[1, 1] = 9.3  # above 8.191 m the last bits are in use
    values = np.rint(1000 * metres).astype(np.uint16)
    save_image(scene / "image/0000103.jpg")
    (scene / "intrinsics.txt").write_text("1 0 0 0 1 0 0 0 1")
    (scene / "scene.txt").write_text("office")
    (scene / depths).mkdir()
    Image.fromarray((values << 3) | (values >> 13)).save(scene / depths / "0000104.png")
    depth = open_source(f"rgbd:{tmp_path}")[0].depth
    assert depth is not None and depth[1, 1] == pytest.approx(9.3)
    np.testing.assert_allclose(depth.ravel()[1:], metres.ravel()[1:], atol=6e-4)


def test_sun_rgbd_takes_depth_as_it_was_measured(tmp_path: Path):
    write(tmp_path, {"image/a.jpg": None, "depth/b.png": 1000, "depth_bfx/b.png": 500})
    (pairs,) = find_pairs(Listing(str(tmp_path), sorted(all_files(tmp_path)))).values()
    assert [pair.depth for pair in pairs] == ["depth/b.png"]


@pytest.mark.parametrize("text", ["intrinsics.txt", "scene.txt"])
def test_one_text_beside_a_frame_does_not_make_it_sun_rgbd(tmp_path: Path, text: str):
    write(tmp_path, {"image/a.jpg": None, "depth/a.png": 1000})
    (tmp_path / text).write_text("office")
    check_ramp(open_source(f"rgbd:{tmp_path}")[0].depth, 6e-4)


def test_two_images_in_a_folder_are_no_frame_of_sun_rgbd(tmp_path: Path):
    write(tmp_path, {f"image/{name}.jpg": None for name in "ab"} | {"depth_bfx/a.png": 1000})
    with pytest.raises(UserError, match="2 images below .*none with depth"):
        open_source(f"rgbd:{tmp_path}")


def test_hypersim(tmp_path: Path):
    images = tmp_path / "ai_001_001/images"
    for name in ("frame.0000.tonemap.jpg", "frame.0000.color.jpg", "frame.0001.tonemap.jpg"):
        save_image(images / "scene_cam_00_final_preview" / name)
    depth = images / "scene_cam_00_geometry_hdf5/frame.0000.depth_meters.hdf5"
    depth.parent.mkdir()
    with h5py.File(depth, "w") as file:
        file["dataset"] = ramp().astype(np.float16)
    source = open_source(f"rgbd:{tmp_path}")
    assert [source.name(i) for i in range(len(source))] == [
        "ai_001_001/images/scene_cam_00_final_preview/frame.0000.tonemap.jpg"
    ]
    check_ramp(source[0].depth, 2e-3)


# ---------------------------------------------------------------------- frames in HDF5 files


def write_labeled(path: Path, frames: int = 3) -> np.ndarray:
    """A `.mat` as NYU's: frame i has depth i + the ramp; returns the images."""
    images = np.random.default_rng(0).integers(0, 256, (frames, HEIGHT, WIDTH, 3), np.uint8)
    depths = np.stack([np.where(ramp() > 0, ramp() + i, 0) for i in range(frames)])
    with h5py.File(path, "w") as file:
        file["images"] = images.transpose(0, 3, 2, 1)
        file["depths"] = depths.transpose(0, 2, 1)
        file["more/names"] = [b"kitchen"]
    return images


@pytest.mark.parametrize("spec", ["rgbd:{0}", "rgbd:{0}/nyu.mat"])
def test_frames_of_a_labeled_file(tmp_path: Path, spec: str):
    images = write_labeled(tmp_path / "nyu.mat")
    (tmp_path / "splits.mat").write_bytes(b"MATLAB 5.0 MAT-file")  # is no HDF5
    source = pickle.loads(pickle.dumps(open_source(spec.format(tmp_path))))
    assert (len(source), source.has_depth) == (3, True)
    assert [source.name(i) for i in range(3)] == [f"nyu.mat#{i}" for i in range(3)]
    for i in range(3):
        record = source[i]
        np.testing.assert_array_equal(record.image, images[i])
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
    images = write_labeled(tmp_path / "b.MAT", 1)
    source = open_source(f"rgbd:{tmp_path}")
    assert [source.name(i) for i in range(3)] == ["a.mat#0", "a.mat#1", "b.MAT#0"]
    np.testing.assert_array_equal(source[2].image, images[0])
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


def test_depth_behind_a_link_is_among_the_inputs(tmp_path: Path):
    write(tmp_path, {"src/color/0.jpg": None, "elsewhere/0.png": 1000})
    (tmp_path / "src/depth").symlink_to(tmp_path / "elsewhere")
    source = open_source(f"rgbd:{tmp_path}/src")
    assert source.name(0) == "color/0.jpg" and str(tmp_path / "elsewhere") in source.inputs
    before = source.fingerprint()
    save_units(tmp_path / "elsewhere/0.png", 500)
    assert source.fingerprint() != before


def test_images_without_depth_are_left_out_and_counted(tmp_path: Path):
    files, expected = LAYOUTS["TUM RGB-D"]
    write(tmp_path, files)
    source = open_source(f"rgbd:{tmp_path}")
    assert source_notes(source) == [
        f"rgbd:{tmp_path}: images without depth left out: 1, for example "
        "fr1/rgb/1305031103.000000.png"
    ]


def test_depth_without_an_image_is_no_image(tmp_path: Path):
    write(tmp_path, {"a.jpg": None, "a_depth.png": 1000, "b_depth.png": 1000, "c.jpg": None})
    save_image(tmp_path / "b_depth_mask.png")
    source = open_source(f"rgbd:{tmp_path}")
    assert [source.name(i) for i in range(len(source))] == ["a.jpg", "c.jpg"]
    assert source_notes(source) == [
        f"rgbd:{tmp_path}: depth maps and masks without an image left out: 2, for example "
        "b_depth.png"
    ]


def test_frames_beside_images_are_left_out_and_counted(tmp_path: Path):
    write(tmp_path, {"a.jpg": None, "b.jpg": None, "b_depth.png": 1000})
    frame_of(rgb=RGB, depth=ramp())(tmp_path / "c.h5")
    frame_of(depth=ramp())(tmp_path / "a_depth.h5")  # of an image, which has no frames
    source = open_source(f"rgbd:{tmp_path}")
    assert len(source) == 2
    assert source_notes(source) == [
        f"rgbd:{tmp_path}: HDF5 files of frames beside images left out: 1, for example c.h5"
    ]


def test_a_folder_is_not_compared_with_every_other(monkeypatch):
    compared, key = [], layouts._key

    def count(name: str) -> str:
        compared.append(name)
        return key(name)

    monkeypatch.setattr(layouts, "_key", count)
    files = [f"{i}{kind}/1.png" for i in range(100) for kind in ("", "_depth")]
    assert len(find_pairs(Listing("", files))["ScanNet or ARKitScenes"]) == 100
    assert 200 <= len(compared) < 1000


# ------------------------------------------------------------------------------- packed


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

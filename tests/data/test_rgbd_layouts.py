"""`rgbd:` over the layouts of RGB-D data sets, and their depth files of every kind."""

import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.sources import layouts, open_source
from spatial_ssrl_jax.data.sources.depthmap import DepthTarget
from spatial_ssrl_jax.data.sources.layouts import OWN, find_pairs
from spatial_ssrl_jax.data.sources.listing import Listing
from spatial_ssrl_jax.data.sources.mixture import source_notes
from tests.data.test_sources import HEIGHT, WIDTH, check_ramp, ramp, save_depth, save_image

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
            "scene0000_01/color/0.jpg": None,
            "scene0000_01/depth_rgb/0.png": None,  # a picture of depth
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
    pictures = tmp_path / "ai_001_001/images"
    for name in ("frame.0000.tonemap.jpg", "frame.0000.color.jpg", "frame.0001.tonemap.jpg"):
        save_image(pictures / "scene_cam_00_final_preview" / name)
    depth = pictures / "scene_cam_00_geometry_hdf5/frame.0000.depth_meters.hdf5"
    depth.parent.mkdir()
    with h5py.File(depth, "w") as file:
        file["dataset"] = ramp().astype(np.float16)
    source = open_source(f"rgbd:{tmp_path}")
    assert [source.name(i) for i in range(len(source))] == [
        "ai_001_001/images/scene_cam_00_final_preview/frame.0000.tonemap.jpg"
    ]
    check_ramp(source[0].depth, 2e-3)


def test_depth_behind_a_link_is_among_the_inputs(tmp_path: Path):
    write(tmp_path, {"src/color/0.jpg": None, "elsewhere/0.png": 1000})
    (tmp_path / "src/depth").symlink_to(tmp_path / "elsewhere")
    source = open_source(f"rgbd:{tmp_path}/src")
    assert source.name(0) == "color/0.jpg" and str(tmp_path / "elsewhere") in source.inputs
    before = source.fingerprint()
    save_units(tmp_path / "elsewhere/0.png", 500)
    assert source.fingerprint() != before


def test_megadepth_is_for_its_own_kind(tmp_path: Path):
    save_image(tmp_path / "dense0/imgs/a.jpg")
    save_depth(tmp_path / "dense0/depths/a.h5", ramp())  # perhaps an ordinal map
    with pytest.raises(UserError, match="1 image below .*none with depth"):
        open_source(f"rgbd:{tmp_path}")


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


def test_a_folder_is_not_compared_with_every_other(monkeypatch):
    compared, key = [], layouts._key

    def count(name: str) -> str:
        compared.append(name)
        return key(name)

    monkeypatch.setattr(layouts, "_key", count)
    files = [f"{i}{kind}/1.png" for i in range(100) for kind in ("", "_depth")]
    assert len(find_pairs(Listing("", files))["ScanNet or ARKitScenes"]) == 100
    assert 200 <= len(compared) < 1000

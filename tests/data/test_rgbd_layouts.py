"""`rgbd:` over the layouts of RGB-D data sets, and their depth files of every kind."""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image, features

from spatial_ssrl_jax import prepare
from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.data.images import open_image, reads_heif
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.data.sources.depthmap import DepthTarget, read_depth
from spatial_ssrl_jax.data.sources.layouts import find_pairs
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
        },
        {
            "seq-01/frame-000000.color.png": "seq-01/frame-000000.depth.png",
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
    (scene / depths).mkdir()
    Image.fromarray((values << 3) | (values >> 13)).save(scene / depths / "0000104.png")
    depth = open_source(f"rgbd:{tmp_path}")[0].depth
    assert depth is not None and depth[1, 1] == pytest.approx(9.3)
    np.testing.assert_allclose(depth.ravel()[1:], metres.ravel()[1:], atol=6e-4)


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


# ------------------------------------------------------------------------------ depth files


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
def test_depth_files(tmp_path: Path, name: str):
    make, tolerance = DEPTH_FILES[name]
    make(tmp_path / name)
    check_ramp(read_depth(str(tmp_path / name), TARGET), tolerance)


def write_exr(path: Path, **channels: np.ndarray) -> None:
    OpenEXR = pytest.importorskip("OpenEXR", reason="pip install 'spatial_ssrl_jax[exr]'")
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File(header, channels).write(str(path))


def test_exr_files(tmp_path: Path):
    others = {"A": np.ones((HEIGHT, WIDTH), np.float32), "B": ramp() + 1}
    write_exr(tmp_path / "a.exr", Z=ramp(), **others)
    check_ramp(read_depth(str(tmp_path / "a.exr"), TARGET))
    write_exr(tmp_path / "b.exr", **others)
    with pytest.raises(BadImage, match=r"b\.exr: .*several \(A, B\)"):
        read_depth(str(tmp_path / "b.exr"), TARGET)


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
    import io
    import zipfile

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


# ------------------------------------------------------------- what is left out, and said


def test_images_without_depth_are_left_out_and_counted(tmp_path: Path):
    files, expected = LAYOUTS["TUM RGB-D"]
    write(tmp_path, files)
    source = open_source(f"rgbd:{tmp_path}")
    assert source_notes(source) == [
        f"rgbd:{tmp_path}: images without depth left out: 1, for example "
        "fr1/rgb/1305031103.000000.png"
    ]


@pytest.mark.parametrize("name", [*LAYOUTS, "beside"])
def test_a_folder_of_photos_has_no_depth_maps(tmp_path: Path, name: str):
    beside: dict[str, float | None] = {"b.png": None, "b_depth.png": 1000, "c_depth.jpg": None}
    files = LAYOUTS[name][0] if name in LAYOUTS else beside
    write(tmp_path, files)
    if name == "beside":
        save_units(tmp_path / "b_depth_mask.png", 1)
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
    assert np.abs(source[0].image.mean((0, 1)) - (200, 30, 90)).max() < 6


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

"""How depth is read by a source's options: turned with its image, inverse, and saturated."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import h5py
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from spatial_ssrl_jax import prepare
from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.common.reading import READING, DepthValues, Reading
from spatial_ssrl_jax.config import Config
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.data.sources.depthmap import DepthTarget, read_depth
from spatial_ssrl_jax.data.sources.stored import StoredSource
from spatial_ssrl_jax.data.task_sources import task_sources, unusable
from spatial_ssrl_jax.tasks import TASKS_BY_NAME
from spatial_ssrl_jax.tasks.record import Record
from tests.conftest import ROOT
from tests.data.test_images import TURNS
from tests.data.test_sources import save_depth, save_image
from tests.helpers.images import photo

FIELD = ROOT.parent / "shared" / "field" / "rgbd"
HEIGHT, WIDTH = 12, 16
SIDEWAYS = (5, 6, 7, 8)
# kind -> image, depth
LAYOUTS = {
    "rgbd": ("a.png", "a_depth.npy"),
    "diode": ("a.png", "a_depth.npy"),
    "megadepth": ("dense0/imgs/a.png", "dense0/depths/a.h5"),
    "nyu": ("rgb_1.png", "sync_depth_1.png"),
}


def metres(shape: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """Depths of whole millimetres, each another, without any symmetry."""
    return np.arange(1000, 1000 + shape[0] * shape[1], dtype=np.float32).reshape(shape) / 1000


def save_turned(path: Path, orientation: int, shape: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    """An image of one colour, stored at `shape` and displayed by an EXIF orientation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", shape[::-1], (9, 8, 7)).save(path, exif=exif)


def check(depth: np.ndarray | None, right: np.ndarray) -> None:
    assert depth is not None and depth.dtype == np.float32 and depth.flags.c_contiguous
    np.testing.assert_allclose(depth, right, rtol=1e-6)


# ------------------------------------------------------------------------------- EXIF


@pytest.mark.parametrize("orientation", TURNS)
def test_depth_is_turned_as_its_image(tmp_path: Path, orientation: int):
    """Sideways ones by their shape alone, others as the SPEC says."""
    save_turned(tmp_path / "a.png", orientation)
    save_depth(tmp_path / "a_depth.npy", metres())
    displayed = TURNS[orientation](metres())
    for option, right in (("stored", displayed), ("displayed", metres())):
        source = pickle.loads(pickle.dumps(open_source(f"rgbd:{tmp_path},exif={option}")))
        record = source[0]
        assert record.image.shape[:2] == displayed.shape and record.turned == (orientation != 1)
        check(record.depth, displayed if orientation in SIDEWAYS else right)
    plain = open_source(f"rgbd:{tmp_path}")
    if orientation in (1, *SIDEWAYS):
        check(plain[0].depth, displayed)
    else:
        with pytest.raises(
            BadImage, match=rf"a_depth\.npy: .*EXIF orientation {orientation}.*,exif=stored"
        ):
            plain[0]


@pytest.mark.parametrize("orientation", SIDEWAYS)
def test_depth_of_the_displayed_shape_is_taken_as_it_is(tmp_path: Path, orientation: int):
    save_turned(tmp_path / "a.png", orientation)
    for shape in ((WIDTH, HEIGHT), (WIDTH // 2, HEIGHT // 2)):
        right = metres(shape).repeat(WIDTH // shape[0], 0).repeat(HEIGHT // shape[1], 1)
        save_depth(tmp_path / "a_depth.npy", metres(shape))
        for options in ("", ",exif=stored"):  # shapes are certain
            check(open_source(f"rgbd:{tmp_path}{options}")[0].depth, right)


@pytest.mark.parametrize(
    ("stored", "depth", "certain"),
    [
        ((200, 201), (200, 201), "stored"),
        ((200, 201), (201, 200), "displayed"),
        ((200, 201), (50, 50), None),  # within 2 % of both
        ((100, 100), (100, 100), None),
        ((100, 103), (50, 51), "stored"),
    ],
)
def test_nearly_square_depth_is_certain_by_its_exact_shape(tmp_path: Path, stored, depth, certain):
    save_depth(tmp_path / "d.npy", metres(depth))
    plain = DepthTarget(stored[::-1], 6)
    named = DepthTarget(stored[::-1], 6, Reading(exif="displayed"))
    if certain is None:
        with pytest.raises(BadImage, match="EXIF orientation 6"):
            read_depth(str(tmp_path / "d.npy"), plain)
        certain = "displayed"
    found = read_depth(str(tmp_path / "d.npy"), named)
    turned = found[0, -1] < found[0, 0]
    assert found.shape == stored[::-1] and turned == (certain == "stored")


def test_a_shape_of_neither_picture_is_refused(tmp_path: Path):
    save_depth(tmp_path / "d.npy", metres((10, 30)))
    for orientation in (1, 3, 6):
        with pytest.raises(BadImage, match="30x10, is not that of its image, 12x16"):
            read_depth(str(tmp_path / "d.npy"), DepthTarget((16, 12), orientation))


def test_a_mask_is_turned_with_its_depth(tmp_path: Path):
    save_turned(tmp_path / "a.jpg", 6)
    save_depth(tmp_path / "a_depth.npy", metres())
    mask = np.ones((HEIGHT, WIDTH), bool)
    mask[:, :3] = False
    np.save(tmp_path / "a_depth_mask.npy", mask)
    depth = open_source(f"rgbd:{tmp_path}")[0].depth
    np.testing.assert_array_equal(np.isnan(depth), ~TURNS[6](mask))


def test_refused_pictures_are_counted_and_others_serve(tmp_path: Path):
    for name, orientation in (("a.jpg", 1), ("b.jpg", 3)):
        save_turned(tmp_path / name, orientation)
        save_depth(tmp_path / f"{name[0]}_depth.npy", metres())
    prepare.main(["rgbd", str(tmp_path), str(tmp_path / "out"), "--max-bad-fraction=0.5"])
    assert len(open_source(f"tfds:ssrl_pictures/rgbd@{tmp_path / 'out'}")) == 1


@pytest.mark.skipif(not FIELD.is_dir(), reason=f"{FIELD} is missing")
def test_a_real_picture_upside_down(tmp_path: Path):
    for name in ("exif180.jpg", "exif180_depth.png"):
        (tmp_path / name).symlink_to(FIELD / name)
    with pytest.raises(BadImage, match="EXIF orientation 3"):
        open_source(f"rgbd:{tmp_path}")[0]
    depth = open_source(f"rgbd:{tmp_path},exif=stored")[0].depth
    third = len(depth) // 3
    assert np.nanmedian(depth[-third:]) < np.nanmedian(depth[:third])  # the floor is near


# ------------------------------------------------------------------ what the values are


# what files hold -> what becomes of valid values x
VALUES: dict[DepthValues, Callable[[np.ndarray], np.ndarray]] = {
    "distance": lambda x: x,
    "inverse": lambda x: 1 / x,
    "relative-inverse": lambda x: 2 * np.nanmax(x) - x,
}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("held", [None, *get_args(DepthValues)])
def test_values_of_every_kind(tmp_path: Path, kind: str, held: DepthValues | None):
    image, depth = LAYOUTS[kind]
    values = metres()
    values[2, 3:5] = 0
    if kind in ("rgbd", "diode"):
        values[0, :3] = np.nan, np.inf, -1
        np.save(tmp_path / "a_depth_mask.npy", np.ones((HEIGHT, WIDTH)))
    save_image(tmp_path / image)
    save_depth(tmp_path / depth, values)
    option = f",depth={held}" if held else ""
    source = pickle.loads(pickle.dumps(open_source(f"{kind}:{tmp_path}{option}")))
    valid = np.where(np.isfinite(values) & (values > 0), values, np.nan)
    check(source[0].depth, VALUES[held or "distance"](valid))
    assert source.has_depth and source.has_distances == (held != "relative-inverse")


def test_an_inverse_of_almost_nothing_is_finite(tmp_path: Path):
    values = metres()
    values[0, 0] = 1e-42
    np.save(tmp_path / "d.npy", values)
    depth = read_depth(
        str(tmp_path / "d.npy"), DepthTarget(values.shape, 1, Reading(depth="inverse"))
    )
    assert np.isnan(depth[0, 0]) and np.isnan(depth).sum() == 1 and not np.isinf(depth).any()


def scene(depth: np.ndarray) -> Record:
    return Record(photo(0, *depth.shape), depth, "x", "x", "x")


def example(task: str, depth: np.ndarray, seed: int) -> tuple[str, str, list[list[int]]]:
    """Question, answer and points of an example drawn from a depth map alone."""
    settings = Config("x").tasks[task]
    made = TASKS_BY_NAME[task].make(scene(depth), np.random.default_rng(seed), settings)
    return made.question, made.answer, made.truth["points"]


def room(size: tuple[int, int] = (240, 320)) -> np.ndarray:
    """A room's depth in metres."""
    record = open_source(f"scenes:1:{size[1]}x{size[0]}")[0]
    assert record.depth is not None
    return record.depth


def test_inverse_depth_gives_the_questions_of_its_distance(tmp_path: Path):
    """Disparity is in pixels: a factor that none of the questions depends on."""
    depth = room()
    save_image(tmp_path / "a.png", depth.shape)
    np.save(tmp_path / "a_depth.npy", 73.5 / depth)
    found = open_source(f"rgbd:{tmp_path},depth=inverse")[0].depth
    for task in ("depth", "position"):
        for seed in range(8):
            assert example(task, found, seed) == example(task, depth, seed)


def test_relative_inverse_depth_gives_an_order_whatever_its_scale_and_shift(tmp_path: Path):
    depth, examples, source = room(), [], None
    save_image(tmp_path / "a.png", depth.shape)
    for scale, shift in ((1, 0), (64, 0), (1, 4)):
        np.save(tmp_path / "a_depth.npy", (scale / depth + shift).astype(np.float32))
        source = open_source(f"rgbd:{tmp_path},depth=relative-inverse")
        found = source[0].depth
        order, right = np.argsort(found, axis=None), depth.ravel()
        assert (np.diff(right[order]) >= -1e-3).all()
        examples.append([example("depth", found, seed) for seed in range(8)])
    assert examples[0] == examples[1] == examples[2]
    assert source is not None and not source.has_distances
    position = TASKS_BY_NAME["position"]
    assert task_sources(source, range(1), position, Config("x").tasks["position"]) == []
    assert "position needs distances and rgbd:" in unusable(source, position)
    with pytest.raises(UserError, match="position is asked of .*only the order of depths"):
        open_source(f"position@rgbd:{tmp_path},depth=relative-inverse")


# --------------------------------------------------------------------------- saturated


@pytest.mark.parametrize(
    ("ending", "dtype"),
    [
        (".png", "uint16"),
        (".h5", "uint16"),
        (".npy", "uint8"),
        (".npy", "uint16"),
        (".npy", "int16"),
        (".npy", "int32"),
    ],
)
def test_the_largest_integer_is_no_depth(tmp_path: Path, ending: str, dtype: str):
    values = np.arange(1, 1 + HEIGHT * WIDTH, dtype=dtype).reshape(HEIGHT, WIDTH)
    values[:4] = np.iinfo(dtype).max
    path = tmp_path / f"d{ending}"
    if ending == ".png":
        Image.fromarray(values).save(path)
    elif ending == ".h5":
        save_depth(path, values)
    else:
        np.save(path, values)
    depth = read_depth(str(path), DepthTarget((HEIGHT, WIDTH)))
    assert np.isnan(depth[:4]).all() and np.isfinite(depth[4:]).all()


def test_a_largest_integer_in_a_record_and_as_a_float(tmp_path: Path):
    save_image(tmp_path / "a.png", (2, 3))
    values = np.array([[1, 65535, 2], [3, 0, 4]], np.uint16)
    depth = stored(tmp_path / "a.png", values)[0].depth
    np.testing.assert_array_equal(depth, [[1, np.nan, 2], [3, np.nan, 4]])
    np.save(tmp_path / "d.npy", np.full((2, 3), 65535, np.float32))
    assert (read_depth(str(tmp_path / "d.npy"), DepthTarget((2, 3))) == 65535).all()


# ------------------------------------------------- records of TFDS, and frames of HDF5 files


def stored(image: Path, depth: np.ndarray, reading: Reading = READING) -> StoredSource:
    """One record as TFDS stores it."""
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "depth": tfds.features.Tensor(shape=depth.shape, dtype=depth.dtype),
        }
    )
    record = features.serialize_example({"image": image.read_bytes(), "depth": depth})
    return StoredSource("tfds:x", "x", [record], features, (), reading)


@pytest.mark.parametrize("values", get_args(DepthValues))
def test_records_are_read_as_files_are(tmp_path: Path, values: DepthValues):
    save_turned(tmp_path / "a.jpg", 3)
    with pytest.raises(BadImage, match="the depth of x/00000000: .*EXIF orientation 3"):
        stored(tmp_path / "a.jpg", metres(), Reading(depth=values))[0]
    source = stored(tmp_path / "a.jpg", metres(), Reading(depth=values, exif="stored"))
    check(source[0].depth, TURNS[3](VALUES[values](metres())))
    assert source.has_depth and source.has_distances == (values != "relative-inverse")


@pytest.mark.parametrize("values", get_args(DepthValues))
def test_frames_are_read_as_files_are(tmp_path: Path, values: DepthValues):
    depth = np.arange(1, 1 + HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH)
    depth[:4] = 65535
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["rgb"], file["depth"] = np.zeros((3, HEIGHT, WIDTH), np.uint8), depth
    source = open_source(f"rgbd:{tmp_path},depth={values}")
    valid = np.where(depth < 65535, depth, np.nan)
    check(source[0].depth, VALUES[values](valid))
    assert source.has_depth and source.has_distances == (values != "relative-inverse")

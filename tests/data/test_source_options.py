"""Options at the end of a SPEC: how they are written, whom they reach, and what is packed."""

import json
from pathlib import Path

import numpy as np
import pytest

from spatial_ssrl_jax import prepare
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.reading import READING, Reading
from spatial_ssrl_jax.config import Config, DataSettings
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.data.sources.options import split_options
from spatial_ssrl_jax.data.stand_ins import stand_in
from spatial_ssrl_jax.data.task_sources import task_sources
from spatial_ssrl_jax.tasks import TASKS_BY_NAME
from tests.data.test_depth_reading import check, metres, save_turned
from tests.data.test_sources import save_depth, save_image


@pytest.mark.parametrize(
    ("argument", "path", "reading"),
    [
        ("/a", "/a", READING),
        ("/a,depth=inverse", "/a", Reading(depth="inverse")),
        (
            "/a,exif=stored,depth=relative-inverse",
            "/a",
            Reading("white", False, "relative-inverse", "stored"),
        ),
        ("/a, depth = distance", "/a", READING),
        ("/a,b=c,depth=inverse", "/a,b=c", Reading(depth="inverse")),
        ("/a,depth=inverse/b", "/a,depth=inverse/b", READING),
    ],
)
def test_options_are_at_the_end(argument: str, path: str, reading: Reading):
    assert split_options("x", argument) == (path, reading)


def test_options_are_of_their_part_alone(tmp_path: Path):
    for name in "ab":
        save_image(tmp_path / name / "a.png")
        save_depth(tmp_path / name / "a_depth.npy", metres())
    spec = f"depth@2*rgbd:{tmp_path}/a,depth=inverse + rgbd:{tmp_path}/b"
    source = open_source(spec, Reading("drop", True))
    assert source.spec == spec
    assert [part.source.reading for part in source.parts] == [
        Reading("drop", True, "inverse"),
        Reading("drop", True),
    ]
    check(source[0].depth, 1 / metres())
    check(source[1].depth, metres())


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (
            "rgbd:PATH,depth=disparity",
            "depth=disparity is unknown: choose one of distance, inverse",
        ),
        ("rgbd:PATH,exif=6", "exif=6 is unknown: choose one of unknown, stored, displayed"),
        ("rgbd:PATH,depth=inverse,depth=inverse", "has depth= twice"),
        ("folder:PATH,depth=inverse", "reads no depth files"),
        ("scenes:9,exif=stored", "reads no depth files"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, spec: str, reason: str):
    save_image(tmp_path / "a.png")
    save_depth(tmp_path / "a_depth.npy", metres())
    with pytest.raises(UserError, match=reason) as error:
        open_source(spec.replace("PATH", str(tmp_path)))
    assert str(error.value).startswith("source '") and "\n" not in str(error.value)


def test_images_of_the_same_sizes_stand_in_for_a_source_with_options():
    data = DataSettings(source="depth@tfds:ssrl_pictures/nyu,depth=inverse")
    assert stand_in(Config("x", data=data)) == "depth@1.000000*scenes:9:640x480"


@pytest.mark.parametrize("options", ["", ",depth=inverse", ",depth=relative-inverse"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_prepare_stores_what_it_has_read(tmp_path: Path, options: str, orientation: int, capsys):
    """Depth is turned and converted once, so the packed set has no EXIF to turn it by again."""
    folder = tmp_path / "in"
    save_turned(folder / "a.jpg", orientation)
    save_depth(folder / "a_depth.npy", metres())
    options += ",exif=stored"
    prepare.main(["rgbd", f"{folder}{options}", str(tmp_path / "out"), "--json"])
    before = open_source(f"rgbd:{folder}{options}")[0]
    spec = json.loads(capsys.readouterr().out)["source"]
    source = open_source(spec)
    after = source[0]
    np.testing.assert_array_equal(after.image, before.image)
    np.testing.assert_array_equal(after.depth, before.depth)
    assert not after.turned
    serves = bool(task_sources(source, [0], TASKS_BY_NAME["position"], None))
    assert serves == ("relative" not in options)

"""Built-in scenes: the same always, exact in depth by another ray caster, lit from the left."""

import math
import pickle
import time

import numpy as np
import pytest

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.data.synthetic.layout import Camera, Scene, Solid, draw_scene
from spatial_ssrl_jax.data.synthetic.render import FACES, render

SIZE = 112


@pytest.mark.parametrize(
    "spec, count, width, height",
    [
        ("scenes", 100_000, 112, 112),
        ("scenes:7", 7, 112, 112),
        ("scenes:64x48", 100_000, 64, 48),
        ("scenes:7:48x64", 7, 48, 64),
    ],
)
def test_specs(spec, count, width, height):
    source = open_source(spec)
    assert (len(source), source.spec, source.has_depth) == (count, spec, True)
    record = source[count - 1]
    assert record.image.shape == (height, width, 3) and record.image.dtype == np.uint8
    assert record.depth.shape == (height, width) and record.depth.dtype == np.float32
    assert record.spec == spec
    assert record.name == record.path == source.name(count - 1) == f"scene-{count - 1:06d}"


@pytest.mark.parametrize("argument", ["0", "x", "7x", "3:112", "8x64", "-1", "1:2:3", "9x9x9"])
def test_bad_specs(argument):
    spec = f"scenes:{argument}"
    with pytest.raises(UserError, match=spec):
        open_source(spec)


def test_indices():
    source = open_source("scenes:5")
    assert source.name(-1) == "scene-000004"
    assert source.name(np.int64(3)) == "scene-000003"
    with pytest.raises(IndexError):
        source[5]


def test_the_same_always_and_different_from_each_other():
    source, other = open_source("scenes"), pickle.loads(pickle.dumps(open_source("scenes:50")))
    records = [source[i] for i in range(8)]
    for i, record in reversed(list(enumerate(records))):
        again = other[i]
        np.testing.assert_array_equal(record.image, again.image)
        np.testing.assert_array_equal(record.depth, again.depth)
    images = np.stack([r.image for r in records]).astype(float)
    differences = [np.abs(images[i] - images[j]).mean() for i in range(8) for j in range(i)]
    assert min(differences) > 8


def test_a_scene_is_the_same_room_at_every_size():
    small, large = open_source("scenes:40x40")[3], open_source("scenes:120x120")[3]
    centres = large.depth[1::3, 1::3]  # the centre of each 3x3 block is a small pixel's centre
    np.testing.assert_allclose(small.depth, centres, rtol=1e-5)
    np.testing.assert_array_equal(small.image, large.image[1::3, 1::3])


def rotation(camera: Camera) -> np.ndarray:
    """Camera axes (right, up, forward) as columns: pitch about x first, then yaw about y."""
    cp, sp, cy, sy = (f(a) for a in (camera.pitch, camera.yaw) for f in (math.cos, math.sin))
    pitch = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
    yaw = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    return yaw @ pitch


def box_distances(half, start, ray):
    """All distances at which a line crosses a box's six faces, one face after the other."""
    for axis in range(3):
        for side in (-half[axis], half[axis]):
            if ray[axis] == 0:
                continue
            t = (side - start[axis]) / ray[axis]
            point = start + t * ray
            if t > 0 and all(abs(point[k]) <= half[k] for k in range(3) if k != axis):
                yield t


def solid_distance(solid: Solid, start, ray):
    start = start - np.array(solid.centre)
    if solid.kind == "sphere":  # nearest point of the line to the centre, and back by Pythagoras
        closest = -start @ ray
        off = start + closest * ray
        inside = solid.half[0] ** 2 - off @ off
        return closest - math.sqrt(inside) if inside > 0 and closest > 0 else math.inf
    c, s = math.cos(solid.yaw), math.sin(solid.yaw)
    turn = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])
    return min(box_distances(solid.half, turn @ start, turn @ ray), default=math.inf)


def project(scene: Scene, solid: Solid, size: int) -> tuple[int, int]:
    """The pixel, (row, column), that a solid's centre falls in."""
    x, y, z = (np.array(solid.centre) - (0, scene.camera.height, 0)) @ rotation(scene.camera)
    focal = size / 2 / scene.camera.slope
    return math.floor(size / 2 - focal * y / z), math.floor(size / 2 + focal * x / z)


def trace(scene: Scene, row: int, col: int, size: int) -> tuple[float, str]:
    """Depth at one pixel and what is there, by a scalar ray of unit length."""
    axes = rotation(scene.camera)
    focal = size / 2 / scene.camera.slope
    ray = axes @ np.array([(col + 0.5 - size / 2) / focal, (size / 2 - row - 0.5) / focal, 1.0])
    ray /= np.linalg.norm(ray)
    eye = np.array([0, scene.camera.height, 0])
    low, high = np.array(scene.low), np.array(scene.high)
    found = [(min(box_distances((high - low) / 2, eye - (low + high) / 2, ray)), "room")]
    found += [(solid_distance(solid, eye, ray), solid.kind) for solid in scene.solids]
    distance, what = min(found)
    return distance * float(ray @ axes[:, 2]), what


def test_depth_is_exact_by_an_independent_ray_caster():
    rng = np.random.default_rng(0)
    seen = []
    for index in range(16):
        scene = draw_scene(index)
        _, depth = render(scene, SIZE, SIZE)
        centres = [project(scene, solid, SIZE) for solid in scene.solids]
        inside = [c for c in centres if min(c) >= 0 and max(c) < SIZE]
        for row, col in [*inside, *rng.integers(0, SIZE, (40, 2))]:
            expected, what = trace(scene, row, col, SIZE)
            seen.append(what)
            assert depth[row, col] == pytest.approx(expected, rel=1e-5), (index, row, col, what)
    assert all(seen.count(what) > 20 for what in ("room", "box", "sphere")), seen


def test_rooms_are_plausible():
    for index in range(40):
        scene = draw_scene(index)
        image, depth = render(scene, SIZE, SIZE)
        assert np.isfinite(depth).all() and depth.min() > 0.3 and depth.max() < 12
        assert np.percentile(depth, 95) > 1.5 * np.percentile(depth, 5)
        assert image.std() > 15
        assert scene.lamp[0] < scene.low[0]
        assert set(p.wall for p in scene.panels) <= set(FACES)


def test_solids_are_in_the_room_without_touching():
    for index in range(300):
        scene = draw_scene(index)
        assert 2 <= len(scene.solids) <= 5
        for solid in scene.solids:
            bottom, top = solid.centre[1] - solid.half[1], solid.centre[1] + solid.half[1]
            assert bottom > -1e-9 and top < scene.high[1] - 0.4
            assert scene.low[0] < solid.centre[0] < scene.high[0]
            assert 1.2 < solid.centre[2] < scene.high[2]
            others = [s for s in scene.solids if s is not solid]
            tops = [s.centre[1] + s.half[1] for s in others if s.centre[::2] == solid.centre[::2]]
            assert bottom < 1e-9 or any(abs(bottom - t) < 1e-9 for t in tops)


def test_images_tell_up_from_down_and_left_from_right():
    """Ceilings are brighter than floors; right walls, which face the lamp, than left ones."""
    source = open_source("scenes")
    luma = np.stack([source[i].image.mean(2) for i in range(60)])
    assert (luma[:, :20].mean((1, 2)) > luma[:, -20:].mean((1, 2))).mean() > 0.85
    left, right = luma[:, 40:70, :12].mean((1, 2)), luma[:, 40:70, -12:].mean((1, 2))
    assert (right > left).mean() > 0.75


def test_speed():
    source = open_source("scenes")
    source[0]
    start = time.process_time()
    for i in range(10):
        source[i]
    assert (time.process_time() - start) / 10 < 0.05  # some 6 ms on an idle core

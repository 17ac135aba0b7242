"""Casts one ray a pixel into a synthetic scene: exact depth, and a shaded image.

Rays have length 1 along the optical axis, so that a ray's parameter is the depth z itself.
Key: N pixels; vectors are [3, N] float64.
"""

import math

import numpy as np

from spatial_ssrl_jax.data.synthetic.layout import Camera, Scene, Solid
from spatial_ssrl_jax.data.synthetic.paint import paint_room, paint_solid

FACES = ("left", "floor", "back", "right", "ceiling")  # as `_cast_room` numbers them
_NORMALS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, -1], [-1, 0, 0], [0, -1, 0]], np.float64)
_AMBIENT, _DIFFUSE, _SHADOW = 0.45, 0.95, 0.3
_REACH = 30.0  # square metres: at this square distance the lamp's light has halved
_LIFT = 1e-3  # metres off a surface where its shadow ray starts


def render(scene: Scene, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Renders a scene.

    Returns:
      The image, [H, W, 3] uint8, and its depth along the optical axis at the pixels' centres,
      [H, W] float32 metres.
    """
    eye = np.array([0.0, scene.camera.height, 0.0])
    rays = camera_rays(scene.camera, width, height)
    squares = (rays * rays).sum(0)
    depth, hit = _cast(scene, eye, rays, squares)
    points = eye[:, None] + depth * rays
    albedo, normals, glow = _surfaces(scene, points, hit)
    light = np.maximum(_light(scene, points, normals), glow)
    colour = _haze(scene, albedo * light, np.sqrt(squares) * depth)
    image = np.rint(255 * np.clip(colour, 0, 1)).astype(np.uint8)
    image = np.ascontiguousarray(image.T).reshape(height, width, 3)
    return image, depth.reshape(height, width).astype(np.float32)


def camera_rays(camera: Camera, width: int, height: int) -> np.ndarray:
    """Directions through the pixels' centres in reading order, [3, N], 1 along the optical axis."""
    focal = 0.5 * max(width, height) / camera.slope
    across = (np.arange(width) + 0.5 - width / 2) / focal
    up = (height / 2 - 0.5 - np.arange(height)) / focal
    across, up = (a.ravel() for a in np.meshgrid(across, up))
    cos, sin = math.cos(camera.pitch), math.sin(camera.pitch)
    y, forward = up * cos + sin, cos - up * sin
    cos, sin = math.cos(camera.yaw), math.sin(camera.yaw)
    return np.stack([across * cos + forward * sin, y, forward * cos - across * sin])


def _cast(
    scene: Scene, eye: np.ndarray, rays: np.ndarray, squares: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Depth [N], and the object hit [N]: a face of the room, or `len(FACES)` + a solid's index."""
    depth, hit = _cast_room(scene, eye, rays)
    for i, solid in enumerate(scene.solids):
        index, t = _cast_solid(solid, eye, rays, squares)
        nearer = t < depth[index]
        index = index[nearer]
        depth[index], hit[index] = t[nearer], len(FACES) + i
    return depth, hit


def _cast_room(scene: Scene, eye: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays leave the room, seen from inside; the wall behind the camera is never seen."""
    low, high = np.array(scene.low) - eye, np.array(scene.high) - eye
    up = rays > 0
    with np.errstate(divide="ignore"):
        t = np.where(up, high[:, None], low[:, None]) / rays
    axis = t.argmin(0)
    face = np.where(up[0], 3, 0), np.where(up[1], 4, 1), np.full(axis.shape, 2)
    return t.min(0), np.choose(axis, face)


def _cast_solid(
    solid: Solid, start: np.ndarray, rays: np.ndarray, squares: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Casts rays [3, N] from one point [3] at a solid; `squares` [N] are the rays' square lengths.

    Returns:
      Indices [K] of the rays that come near the solid, and the parameters [K] at which they
      enter it, infinite on a miss.
    """
    start = start - np.array(solid.centre)
    index = _near(solid, start, rays, squares)
    rays, start = to_solid(solid, rays[:, index]), to_solid(solid, start[:, None])
    enter = _enter_box if solid.kind == "box" else _enter_ball
    return index, enter(solid, start, rays)


def _near(solid: Solid, start: np.ndarray, rays: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Indices [K] of the rays that meet the ball around a solid, whose centre is the origin."""
    reach = solid.half[0] if solid.kind == "sphere" else math.hypot(*solid.half)
    beyond = start @ start - reach * reach
    if beyond <= 0:
        return np.arange(rays.shape[1])
    along = -start @ rays
    return np.flatnonzero((along > 0) & (along * along >= beyond * squares))


def to_solid(solid: Solid, vectors: np.ndarray) -> np.ndarray:
    """Rotates vectors [3, N] of the room into the solid's own axes."""
    cos, sin = math.cos(solid.yaw), math.sin(solid.yaw)
    x, y, z = vectors
    return np.stack([cos * x - sin * z, y, sin * x + cos * z])


def _enter_box(solid: Solid, start: np.ndarray, rays: np.ndarray) -> np.ndarray:
    half = np.array(solid.half)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = 1 / rays
        middle, reach = -start * inverse, half * np.abs(inverse)
    enter, leave = (middle - reach).max(0), (middle + reach).min(0)
    return np.where((enter < leave) & (enter > 0), enter, np.inf)


def _enter_ball(solid: Solid, start: np.ndarray, rays: np.ndarray) -> np.ndarray:
    a, b = (rays * rays).sum(0), (start * rays).sum(0)
    c = (start * start).sum(0) - solid.half[0] ** 2
    square = b * b - a * c
    enter = (-b - np.sqrt(np.maximum(square, 0))) / a
    return np.where((square > 0) & (enter > 0), enter, np.inf)


def _surfaces(
    scene: Scene, points: np.ndarray, hit: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Colours [3, N] and unit normals [3, N] at the points, and light of their own [N]."""
    albedo, normals, glow = np.empty_like(points), np.empty_like(points), np.zeros(hit.shape)
    for i, face in enumerate(FACES):
        index = np.flatnonzero(hit == i)
        albedo[:, index], glow[index] = paint_room(scene, face, points[:, index])
        normals[:, index] = _NORMALS[i][:, None]
    for i, solid in enumerate(scene.solids):
        index = np.flatnonzero(hit == len(FACES) + i)
        inside = to_solid(solid, points[:, index] - np.array(solid.centre)[:, None])
        own = _normals(solid, inside)
        albedo[:, index] = paint_solid(solid, inside, own)
        normals[:, index] = _from_solid(solid, own)
    return albedo, normals, glow


def _normals(solid: Solid, inside: np.ndarray) -> np.ndarray:
    """Unit normals [3, N] at points on the solid's surface, both in its own axes."""
    scaled = inside / np.array(solid.half)[:, None]
    if solid.kind == "sphere":
        return scaled
    axis = np.abs(scaled).argmax(0)
    return np.where(np.arange(3)[:, None] == axis, np.sign(scaled), 0.0)


def _from_solid(solid: Solid, vectors: np.ndarray) -> np.ndarray:
    cos, sin = math.cos(solid.yaw), math.sin(solid.yaw)
    x, y, z = vectors
    return np.stack([cos * x + sin * z, y, cos * z - sin * x])


def _light(scene: Scene, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Light [N] that falls on the points: ambient, and the lamp's by Lambert, with shadows."""
    lamp = np.array(scene.lamp)
    rays = points - lamp[:, None] + _LIFT * normals  # from the lamp; 1 is at the point
    squares = (rays * rays).sum(0)
    lambert = np.maximum(-(normals * rays).sum(0) / np.sqrt(squares), 0)
    shadow = np.zeros(squares.shape, bool)
    for solid in scene.solids:
        index, t = _cast_solid(solid, lamp, rays, squares)
        shadow[index[t < 1]] = True
    lambert[shadow] *= _SHADOW
    return _AMBIENT + _DIFFUSE * lambert * (_REACH / (_REACH + squares))


def _haze(scene: Scene, colour: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Mixes colours [3, N] with the haze's over the distance [N] from the camera."""
    length, haze = scene.haze
    clear = np.exp(-distance / length)
    return colour * clear + np.array(haze)[:, None] * (1 - clear)

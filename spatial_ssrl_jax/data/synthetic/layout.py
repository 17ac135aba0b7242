"""The content of a synthetic scene: room, camera, solids, wall panels and lamp, drawn by seed.

Metres; x to the right, y up, z away from the camera, which is above the origin.
"""

import colorsys
import math
from dataclasses import dataclass, replace

import numpy as np

Vector = tuple[float, float, float]

_SALT = 0x5CE9E5  # separates these draws from others that are seeded by a record's index
_PATTERNS = ("plain", "plain", "bands", "checks")


@dataclass(frozen=True)
class Camera:
    """A pinhole at (0, height, 0).

    Attributes:
      yaw: radians, positive turns to the right.
      pitch: radians, positive looks up.
      slope: tangent of half the angle of view across the image's longer side.
    """

    height: float
    yaw: float
    pitch: float
    slope: float


@dataclass(frozen=True)
class Solid:
    """A box or a sphere.

    Attributes:
      kind: `box` or `sphere`.
      centre: of the solid.
      half: half the sides along its own x, y, z; the radius three times for a sphere.
      yaw: radians about y; a point p of the room is R(yaw) (p - centre) in the solid's own axes.
      colour, accent: RGB in 0..1; `accent` is the second colour of its pattern.
      pattern: `plain`, `bands` or `checks`.
      period: of the pattern.
    """

    kind: str
    centre: Vector
    half: Vector
    yaw: float
    colour: Vector
    accent: Vector
    pattern: str
    period: float


@dataclass(frozen=True)
class Panel:
    """A rectangle on a wall: `centre` and `half` are (along the wall, up).

    Attributes:
      wall: `left`, `right` or `back`; the first two run along z, the last along x.
      kind: `window`, `picture` or `door`.
      colours: of the frame, of the lower and of the upper part, RGB in 0..1.
    """

    wall: str
    kind: str
    centre: tuple[float, float]
    half: tuple[float, float]
    colours: tuple[Vector, Vector, Vector]


@dataclass(frozen=True)
class Surface:
    """A textured plane: two colours, a pattern and its period."""

    colour: Vector
    accent: Vector
    pattern: str
    period: float


@dataclass(frozen=True)
class Scene:
    """A room and its content.

    Attributes:
      low, high: corners of the room, a box parallel to the axes; `low[2]` is behind the camera.
      floor, left, right, back: surfaces. A wall's is wallpaper above `rail` metres, and its accent
        below.
      rail: height of the wall's lower part.
      ceiling: colour.
      lamp: point that lights the room, from beyond its left wall (which stays dim) and high up.
      ceiling_lamp: (x, z, half side) of the bright square on the ceiling.
      haze: metres over which 1 - 1/e of the light is lost to the haze, and the haze's colour.
    """

    low: Vector
    high: Vector
    camera: Camera
    solids: tuple[Solid, ...]
    panels: tuple[Panel, ...]
    floor: Surface
    left: Surface
    right: Surface
    back: Surface
    rail: float
    ceiling: Vector
    lamp: Vector
    ceiling_lamp: tuple[float, float, float]
    haze: tuple[float, Vector]


def draw_scene(index: int) -> Scene:
    """Draws scene `index`: always the same one, whatever the image's size."""
    rng = np.random.default_rng((_SALT, index))
    low = (-rng.uniform(1.3, 2.8), 0.0, -2.0)
    high = (rng.uniform(1.3, 2.8), rng.uniform(2.4, 3.2), rng.uniform(4.0, 7.5))
    camera = Camera(
        height=rng.uniform(1.2, 1.75),
        yaw=math.radians(rng.uniform(-15, 15)),
        pitch=math.radians(rng.uniform(-11, 1)),
        slope=math.tan(math.radians(rng.uniform(60, 74)) / 2),
    )
    walls = _draw_walls(rng)
    return Scene(
        low=low,
        high=high,
        camera=camera,
        solids=_draw_solids(rng, low, high, camera),
        panels=_draw_panels(rng, low, high),
        floor=_draw_floor(rng),
        left=walls[0],
        right=walls[1],
        back=walls[2],
        rail=0.12 if rng.random() < 0.6 else rng.uniform(0.8, 1.1),
        ceiling=_colour(rng.random(), rng.uniform(0.0, 0.08), rng.uniform(0.9, 1.0)),
        lamp=(
            low[0] - rng.uniform(0.2, 1.5),
            high[1] - rng.uniform(0.0, 0.4),
            rng.uniform(0.3, 0.6 * high[2]),
        ),
        ceiling_lamp=_draw_ceiling_lamp(rng, low, high),
        haze=(rng.uniform(11, 18), _colour(rng.uniform(0.5, 0.7), 0.12, rng.uniform(0.6, 0.8))),
    )


def _colour(hue: float, saturation: float, value: float) -> Vector:
    return colorsys.hsv_to_rgb(hue % 1.0, saturation, value)


def _scale(vector: Vector, factor: float) -> Vector:
    return factor * vector[0], factor * vector[1], factor * vector[2]


def _draw_walls(rng: np.random.Generator) -> list[Surface]:
    """Left, right and back: pale tints of hues that are apart, some striped."""
    hue = rng.random()
    surfaces = []
    for shift in (0.0, rng.uniform(0.2, 0.45), rng.uniform(0.55, 0.8)):
        saturation, value = rng.uniform(0.15, 0.45), rng.uniform(0.72, 0.95)
        surfaces.append(
            Surface(
                colour=_colour(hue + shift, saturation, value),
                accent=_colour(hue + shift, saturation + 0.15, value - 0.22),
                pattern=str(rng.choice(["plain", "stripes"])),
                period=rng.uniform(0.5, 0.9),
            )
        )
    return surfaces


def _draw_floor(rng: np.random.Generator) -> Surface:
    hue, saturation = rng.uniform(0.03, 0.13), rng.uniform(0.25, 0.6)
    if rng.random() < 0.4:
        hue, saturation = rng.random(), rng.uniform(0.05, 0.3)
    value = rng.uniform(0.5, 0.8)
    return Surface(
        colour=_colour(hue, saturation, value),
        accent=_colour(hue + rng.uniform(-0.04, 0.04), saturation, value - rng.uniform(0.2, 0.35)),
        pattern=str(rng.choice(["checks", "tiles", "planks"])),
        period=rng.uniform(0.6, 1.0),
    )


def _draw_ceiling_lamp(
    rng: np.random.Generator, low: Vector, high: Vector
) -> tuple[float, float, float]:
    x = rng.uniform(low[0] + 0.6, min(0.2, high[0] - 0.6))
    return x, rng.uniform(2.2, high[2] - 0.8), rng.uniform(0.22, 0.4)


def _draw_panels(rng: np.random.Generator, low: Vector, high: Vector) -> tuple[Panel, ...]:
    """One or none on each wall, inside its bounds."""
    panels = []
    for wall, start, end in (
        ("left", 1.2, high[2]),
        ("right", 1.2, high[2]),
        ("back", low[0], high[0]),
    ):
        if rng.random() < 0.25:
            continue
        kind = str(rng.choice(["window", "picture", "door"]))
        half = {
            "window": (rng.uniform(0.4, 0.7), rng.uniform(0.4, 0.6)),
            "picture": (rng.uniform(0.3, 0.6), rng.uniform(0.25, 0.45)),
            "door": (rng.uniform(0.4, 0.5), rng.uniform(0.95, 1.05)),
        }[kind]
        up = half[1] if kind == "door" else rng.uniform(1.5, 1.7)
        along = rng.uniform(start + half[0] + 0.15, end - half[0] - 0.15)
        panels.append(Panel(wall, kind, (along, up), half, _draw_panel_colours(rng, kind)))
    return tuple(panels)


def _draw_panel_colours(rng: np.random.Generator, kind: str) -> tuple[Vector, Vector, Vector]:
    if kind == "window":  # greenery below, sky above
        green = _colour(rng.uniform(0.2, 0.4), rng.uniform(0.3, 0.6), rng.uniform(0.5, 0.75))
        return (0.95, 0.95, 0.93), green, _colour(0.57, rng.uniform(0.15, 0.45), 1.0)
    if kind == "door":
        wood = _colour(rng.uniform(0.03, 0.1), rng.uniform(0.3, 0.7), rng.uniform(0.35, 0.7))
        return _scale(wood, 0.6), wood, wood
    frame = _colour(0.09, rng.uniform(0.2, 0.7), rng.uniform(0.2, 0.6))
    hue = rng.random()
    return frame, _colour(hue, 0.7, 0.55), _colour(hue + rng.uniform(0.3, 0.7), 0.5, 0.95)


def _draw_solids(
    rng: np.random.Generator, low: Vector, high: Vector, camera: Camera
) -> tuple[Solid, ...]:
    """Two to five solids in view that do not touch: most on the floor, some on a low box."""
    solids: list[Solid] = []
    count = int(rng.integers(2, 6))
    hue = rng.random()
    for attempt in range(200):
        if len(solids) == count:
            break
        hue += 0.618034 + rng.uniform(-0.08, 0.08)  # golden section: neighbours differ in hue
        shrink = max(0.5, 1 - attempt / 100)
        solid = _draw_solid(rng, hue, shrink, low, high, camera)
        base = solids[-1] if solids and rng.random() < 0.2 else None
        if base is not None and base.kind == "box" and base.half[1] < 0.45 and base.centre[1] < 0.5:
            solids.append(_put_on(base, solid))
        elif _fits(solid, solids, low, high):
            solids.append(solid)
    return tuple(solids)


def _draw_solid(
    rng: np.random.Generator, hue: float, shrink: float, low: Vector, high: Vector, camera: Camera
) -> Solid:
    """One solid on the floor, somewhere in the camera's view, perhaps where it does not fit."""
    kind = "sphere" if rng.random() < 0.4 else "box"
    if kind == "sphere":
        radius = shrink * rng.uniform(0.22, 0.55)
        half = (radius, radius, radius)
    else:
        tall = rng.random() < 0.35
        up = rng.uniform(0.5, 0.95) if tall else rng.uniform(0.15, 0.45)
        half = _scale((rng.uniform(0.2, 0.5), up, rng.uniform(0.2, 0.5)), shrink)
    z = rng.uniform(1.9, high[2] - 0.4)
    x = z * math.tan(camera.yaw + math.atan(rng.uniform(-0.9, 0.9) * camera.slope))
    saturation, value = rng.uniform(0.55, 0.9), rng.uniform(0.65, 0.95)
    return Solid(
        kind=kind,
        centre=(x, half[1], z),
        half=half,
        yaw=0.0 if rng.random() < 0.3 else rng.uniform(0, math.pi / 2),
        colour=_colour(hue, saturation, value),
        accent=_colour(hue + rng.uniform(-0.1, 0.1), 0.35 * saturation, min(1.0, value + 0.2)),
        pattern=str(rng.choice(_PATTERNS)),
        period=rng.uniform(0.18, 0.35),
    )


def _radius(solid: Solid) -> float:
    """Of the upright cylinder around a solid."""
    return solid.half[0] if solid.kind == "sphere" else math.hypot(solid.half[0], solid.half[2])


def _fits(solid: Solid, others: list[Solid], low: Vector, high: Vector) -> bool:
    """Whether a solid is clear of the walls, of the camera and of the others."""
    x, _, z = solid.centre
    radius = _radius(solid) + 0.03
    if not (low[0] + radius < x < high[0] - radius and 1.2 + radius < z < high[2] - radius):
        return False
    return all(
        math.hypot(x - other.centre[0], z - other.centre[2]) > radius + _radius(other)
        for other in others
    )


def _put_on(base: Solid, solid: Solid) -> Solid:
    """`solid`, shrunk and moved to the top of the box `base`, at most 0.9 m high."""
    scale = min(1.0, 0.9 * min(base.half[0], base.half[2]) / _radius(solid), 0.45 / solid.half[1])
    half = _scale(solid.half, scale)
    up = base.centre[1] + base.half[1] + half[1]
    centre, period = (base.centre[0], up, base.centre[2]), max(0.1, scale * solid.period)
    return replace(solid, centre=centre, half=half, period=period)

"""The colours of a synthetic scene: textures of the floor, the walls, their panels and the solids.

Key: N points; coordinates are [3, N] float64 metres, colours [3, N] float64 in 0..1.
"""

import numpy as np

from spatial_ssrl_jax.data.synthetic.layout import Panel, Scene, Solid, Surface, Vector

_GROUT = 0.05  # metres
_FRAME = 0.07  # metres


def paint_room(scene: Scene, face: str, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours [3, N] of points on a face of the room, and the minimum light [N] on them."""
    x, y, z = points
    dark = np.zeros(x.shape)
    if face == "floor":
        return _two_tone(scene.floor, _floor_mix(scene.floor, x, z)), dark
    if face == "ceiling":
        at_x, at_z, half = scene.ceiling_lamp
        lamp = np.maximum(np.abs(x - at_x), np.abs(z - at_z)) < half
        colour = np.where(lamp, 1.0, _column(scene.ceiling))
        bounce = 0.95 - 0.25 * (x - scene.low[0]) / (scene.high[0] - scene.low[0])
        return colour, np.where(lamp, 1.6, bounce)
    return _paint_wall(scene, face, x if face == "back" else z, y)


def paint_solid(solid: Solid, inside: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Colours [3, N] of points on a solid; points and normals are in the solid's own axes."""
    if solid.pattern == "plain":
        mix = np.zeros(inside.shape[1])
    elif solid.pattern == "bands":
        flat = np.abs(normals[1]) > 0.99  # a top has one colour
        mix = _alternate((inside[1] + solid.half[1]) / solid.period) * ~flat
    else:
        # Slightly off the centre, so that faces are not on the border of two cells.
        cells = np.floor((inside + 0.013) / solid.period).sum(0)
        mix = cells % 2
    return _blend(solid.colour, solid.accent, mix)


def _paint_wall(
    scene: Scene, face: str, along: np.ndarray, up: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    wall: Surface = getattr(scene, face)
    mix = np.zeros(along.shape)
    if wall.pattern == "stripes":
        mix = 0.35 * _alternate(along / wall.period)
    colour = _two_tone(wall, np.where(up < scene.rail, 1.0, mix))
    glow = np.zeros(along.shape)
    for panel in scene.panels:
        if panel.wall == face:
            _paint_panel(panel, along, up, colour, glow)
    return colour, glow


def _paint_panel(
    panel: Panel, along: np.ndarray, up: np.ndarray, colour: np.ndarray, glow: np.ndarray
) -> None:
    """Paints one panel over a wall's `colour` [3, N] and `glow` [N], in place."""
    a, b = along - panel.centre[0], up - panel.centre[1]
    index = np.flatnonzero((np.abs(a) < panel.half[0]) & (np.abs(b) < panel.half[1]))
    a, b = a[index], b[index]
    frame = (np.abs(a) > panel.half[0] - _FRAME) | (np.abs(b) > panel.half[1] - _FRAME)
    if panel.kind == "window":
        frame |= np.abs(a) < _FRAME / 2
        glow[index] = 0.95
    if panel.kind == "door":  # a knob on one side
        frame |= (np.abs(a - 0.65 * panel.half[0]) < 0.06) & (np.abs(b) < 0.06)
    edge, lower, upper = panel.colours
    horizon = 0.25 * panel.half[1] * np.sin(4 * a / panel.half[0])
    inner = _blend(lower, upper, b > horizon)
    colour[:, index] = np.where(frame, _column(edge), inner)


def _floor_mix(floor: Surface, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Weight [N] of the floor's accent at points of the floor."""
    if floor.pattern == "checks":
        return (np.floor(x / floor.period) + np.floor(z / floor.period)) % 2
    if floor.pattern == "tiles":
        return ((x % floor.period < _GROUT) | (z % floor.period < _GROUT)).astype(np.float64)
    row = np.floor(x / (0.4 * floor.period))  # planks run away from the camera
    plank = np.floor(z / (2.5 * floor.period) + 0.37 * row)
    return np.abs(np.sin(12.9898 * row + 78.233 * plank))


def _alternate(values: np.ndarray) -> np.ndarray:
    return np.floor(values) % 2


def _column(colour: Vector) -> np.ndarray:
    return np.array(colour)[:, None]


def _blend(first: Vector, second: Vector, mix: np.ndarray) -> np.ndarray:
    """[3, N]: `first` where `mix` [N] is 0, `second` where it is 1."""
    return _column(first) + (_column(second) - _column(first)) * mix


def _two_tone(surface: Surface, mix: np.ndarray) -> np.ndarray:
    return _blend(surface.colour, surface.accent, mix)

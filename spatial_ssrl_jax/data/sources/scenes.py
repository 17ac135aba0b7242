"""`scenes`: built-in small ray-cast rooms with exact depth; seeded by index, no files, no network.

`scenes`, `scenes:COUNT`, `scenes:WIDTHxHEIGHT` or `scenes:COUNT:WIDTHxHEIGHT`; 100,000 scenes of
112x112 pixels by default. Scene i is the same room at every size and count.
"""

import re
from dataclasses import dataclass

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.reading import READING, Reading
from spatial_ssrl_jax.data.synthetic.layout import draw_scene
from spatial_ssrl_jax.data.synthetic.render import render
from spatial_ssrl_jax.tasks.record import Record

DEFAULT_COUNT = 100_000
DEFAULT_SIZE = (112, 112)  # width, height
_SIDES = range(16, 4097)
_ARGUMENT = re.compile(r"(\d+)?((?:^|:)\d+x\d+)?")


@dataclass(frozen=True)
class SceneSource:
    """Rooms 0 … count-1, drawn and rendered on access.

    Attributes:
      spec: the SPEC as the user wrote it.
      count: number of scenes.
      width, height: of an image, in pixels.
    """

    spec: str
    count: int
    width: int
    height: int
    has_depth: bool = True
    has_distances: bool = True
    inputs: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        return self.spec

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"scene-{self._checked(index):06d}"

    def size(self, index: int) -> tuple[int, int]:
        return self.height, self.width

    def __getitem__(self, index: int) -> Record:
        """Renders one scene; its depth is z along the optical axis, in metres, without NaN."""
        index = self._checked(index)
        image, depth = render(draw_scene(index), self.width, self.height)
        name = self.name(index)
        return Record(image=image, depth=depth, name=name, spec=self.spec, path=name)

    def _checked(self, index: int) -> int:
        return range(self.count)[index]  # negative from the end; IndexError beyond


def open_scenes(spec: str, argument: str, reading: Reading = READING) -> SceneSource:
    """Opens the rooms, which are in no file, so that nothing is read.

    Raises:
      UserError: the argument is no COUNT, WIDTHxHEIGHT or both.
    """
    count, size = _parse(spec, argument)
    if count < 1:
        raise UserError(f"source '{spec}': the number of scenes must be at least 1.")
    if size[0] not in _SIDES or size[1] not in _SIDES:
        raise UserError(f"source '{spec}': sides must be {_SIDES[0]} to {_SIDES[-1]} pixels.")
    return SceneSource(spec, count, *size)


def _parse(spec: str, argument: str) -> tuple[int, tuple[int, int]]:
    count, size = DEFAULT_COUNT, DEFAULT_SIZE
    match = _ARGUMENT.fullmatch(argument)
    if match is None:
        formats = "scenes, scenes:COUNT, scenes:WIDTHxHEIGHT or scenes:COUNT:WIDTHxHEIGHT"
        raise UserError(f"source '{spec}' cannot be understood; write {formats}.")
    if match[1]:
        count = int(match[1])
    if match[2]:
        width, height = match[2].lstrip(":").split("x")
        size = int(width), int(height)
    return count, size

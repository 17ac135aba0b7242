"""How the files of a source are read: settings of a run, and options of commands."""

from dataclasses import dataclass
from typing import Literal

Transparency = Literal["white", "drop"]


@dataclass(frozen=True)
class Reading:
    """How a source reads its files.

    Attributes:
      transparency: what becomes of transparent pixels: `white` blends them with white, as the model
        family's own reader does; `drop` takes their colours, mostly black, as the released training
        code does.
      allow_outside_paths: whether paths in question files may leave the folder that the user named.
    """

    transparency: Transparency = "white"
    allow_outside_paths: bool = False


READING = Reading()

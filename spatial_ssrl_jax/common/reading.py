"""How the files of a source are read: settings of a run, and options of commands and SPECs."""

from dataclasses import dataclass
from typing import Literal

Transparency = Literal["white", "drop"]
DepthValues = Literal["distance", "inverse", "relative-inverse"]
DepthExif = Literal["unknown", "stored", "displayed"]


@dataclass(frozen=True)
class QuestionFields:
    """Names of the columns of `questions:` files; "" is one of the usual names.

    Attributes:
      problem: the question.
      answer: the right answer.
      images: images, or a single one.
      response: a whole response to learn.
      task: a name for metrics.
    """

    problem: str = ""
    answer: str = ""
    images: str = ""
    response: str = ""
    task: str = ""


@dataclass(frozen=True)
class Reading:
    """How a source reads its files.

    Attributes:
      transparency: what becomes of transparent pixels: `white` blends them with white, as the model
        family's own reader does; `drop` takes their colours, mostly black, as the released training
        code does.
      allow_outside_paths: whether paths in question files may leave the folder that the user named.
      depth: what depth files hold: a `distance`, in metres or up to scale; its `inverse`, up to
        scale, as stereo disparity is; or, with an unknown shift too, its `relative-inverse`, as of
        MiDaS and Depth Anything, which has the order of depths and no distances.
      fields: names of columns of `questions:` files.
      exif: which picture a depth map is of where an EXIF orientation turns its image: the `stored`
        one, so that it is turned too, or the `displayed` one. `unknown` leaves it to their shapes,
        and refuses maps whose shape fits both.
    """

    transparency: Transparency = "white"
    allow_outside_paths: bool = False
    depth: DepthValues = "distance"
    exif: DepthExif = "unknown"
    fields: QuestionFields = QuestionFields()


READING = Reading()

"""Options at the end of a source's SPEC: `rgbd:PATH,depth=inverse,exif=stored`.

They are `Reading`'s `depth` and `exif`, for this source alone.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, get_args

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.reading import READING, DepthExif, DepthValues, Reading
from spatial_ssrl_jax.data.sources.base import Source
from spatial_ssrl_jax.data.sources.ssrl81k import QuestionSource

AnyPart = TypeVar("AnyPart", bound=Source | QuestionSource)

_CHOICES = {"depth": get_args(DepthValues), "exif": get_args(DepthExif)}
_OPTION = re.compile(rf"\s*,\s*({'|'.join(_CHOICES)})\s*=([^,/]*)$")


def split_options(spec: str, argument: str, reading: Reading = READING) -> tuple[str, Reading]:
    """The argument of a SPEC without options, and the reading that they give.

    Raises:
      UserError: an option has an unknown value, or comes twice.
    """
    found: dict[str, Any] = {}
    while match := _OPTION.search(argument):
        name, value = match[1], match[2].strip()
        if value not in _CHOICES[name]:
            known = ", ".join(_CHOICES[name])
            raise UserError(f"source '{spec}': {name}={value} is unknown: choose one of {known}.")
        if name in found:
            raise UserError(f"source '{spec}' has {name}= twice: leave one out.")
        found[name], argument = value, argument[: match.start()]
    return argument, replace(reading, **found)


def open_with_options(
    open_kind: Callable[[str, str, Reading], AnyPart], spec: str, argument: str, reading: Reading
) -> AnyPart:
    """Opens a source of one kind by what follows the first colon of its SPEC.

    Raises:
      UserError: an option is wrong, or the source reads no depth that it could be for; or the kind
        cannot be opened.
    """
    argument, own = split_options(spec, argument, reading)
    source = open_kind(spec, argument, own)
    if own != reading and not (source.has_depth and source.inputs):
        raise UserError(
            f"source '{spec}' reads no depth files, which depth= and exif= are for: leave them out."
        )
    return source

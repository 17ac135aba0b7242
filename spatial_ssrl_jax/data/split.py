"""Splitting a source's records into training and held-out ones."""

import hashlib
from dataclasses import dataclass

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.text import utf8
from spatial_ssrl_jax.data.sources import AnySource, QuestionSource
from spatial_ssrl_jax.data.sources.mixture import mixture_parts


@dataclass(frozen=True)
class RecordSplit:
    """Training and held-out records of one source; the same in every run.

    Attributes:
      train, heldout: record indices.
    """

    train: tuple[int, ...]
    heldout: tuple[int, ...]


def split_records(source: AnySource, fraction: float) -> RecordSplit:
    """Splits by a hash of each image's name: an image is held out where it is below `fraction`.

    An image is therefore in the same set whatever other images there are, as long as its name
    stays, and of few images perhaps none is held out. Ready-made questions of one image are held
    out together.

    Args:
      source: images, ready-made questions or a mixture.
      fraction: of the images that is held out, on average.

    Raises:
      UserError: no image is left for training.
    """
    train, heldout = [], []
    for part in mixture_parts(source):
        records = part.source
        name = records.origin if isinstance(records, QuestionSource) else records.name
        for index in range(len(records)):
            chosen = heldout if _position(name(index)) < fraction else train
            chosen.append(part.start + index)
    if not train:
        raise UserError(
            f"{source.spec}: data.heldout_fraction={fraction} leaves no image for training: give "
            "more images, or lower it."
        )
    return RecordSplit(tuple(train), tuple(heldout))


def _position(name: str) -> float:
    """A name's place in [0, 1), by its hash."""
    digest = hashlib.sha1(utf8(name)).digest()
    return int.from_bytes(digest[:8]) / 2**64

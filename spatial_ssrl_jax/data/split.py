"""Splitting a source's records into training and held-out ones."""

import hashlib
from dataclasses import dataclass

from spatial_ssrl_jax.data.sources import AnySource, QuestionSource
from spatial_ssrl_jax.data.sources.mixture import MixturePart, mixture_parts


@dataclass(frozen=True)
class RecordSplit:
    """Training and held-out records of one source; the same in every run.

    Attributes:
      train, heldout: record indices.
    """

    train: tuple[int, ...]
    heldout: tuple[int, ...]


def split_records(source: AnySource, fraction: float) -> RecordSplit:
    """Splits by a hash of each image's name, so that an image is always in the same set.

    Ready-made questions of one image are held out together. Each part of a mixture is split
    separately, so that its tasks have held-out records too. At least one image is held out where a
    part has two, and at least one is left for training.

    Args:
      source: images, ready-made questions or a mixture.
      fraction: of the images that is held out.
    """
    train, heldout = [], []
    for part in mixture_parts(source):
        images = _images(part)
        count = round(fraction * len(images))
        if fraction > 0 and len(images) > 1:
            count = max(count, 1)
        count = min(count, len(images) - 1)
        train += [index for image in images[count:] for index in image]
        heldout += [index for image in images[:count] for index in image]
    return RecordSplit(tuple(sorted(train)), tuple(sorted(heldout)))


def _images(part: MixturePart) -> list[list[int]]:
    """The records of each image of a part, in the order of a hash of the image's name."""
    source = part.source
    image_name = source.origin if isinstance(source, QuestionSource) else source.name
    records: dict[str, list[int]] = {}
    for index in range(len(source)):
        records.setdefault(image_name(index), []).append(part.start + index)
    return [records[n] for n in sorted(records, key=lambda n: hashlib.sha1(n.encode()).digest())]

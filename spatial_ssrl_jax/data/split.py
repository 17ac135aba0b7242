"""TODO: data.split."""

import hashlib
from dataclasses import dataclass

from spatial_ssrl_jax.data.sources import AnySource, QuestionSource
from spatial_ssrl_jax.data.sources.mixture import MixturePart, mixture_parts


@dataclass(frozen=True)
class RecordSplit:
    """Records of one source, held-out ones apart; the same in every run.

    Attributes:
      train, heldout: record indices.
    """

    train: tuple[int, ...]
    heldout: tuple[int, ...]


def split_records(source: AnySource, share: float) -> RecordSplit:
    """Splits by a hash of each image's name, so that an image never changes sides.

    Ready-made questions of one image are held out together. Each part of a mixture is split for
    itself, so that its tasks have held-out records too. At least one image is held out where a
    part has two, and at least one is left for training.
    """
    train, heldout = [], []
    for part in mixture_parts(source):
        pictures = _pictures(part)
        count = round(share * len(pictures))
        if share > 0 and len(pictures) > 1:
            count = max(count, 1)
        count = min(count, len(pictures) - 1)
        train += [index for picture in pictures[count:] for index in picture]
        heldout += [index for picture in pictures[:count] for index in picture]
    return RecordSplit(tuple(sorted(train)), tuple(sorted(heldout)))


def _pictures(part: MixturePart) -> list[list[int]]:
    """The records of each image of a part, in the order of a hash of the image's name."""
    source = part.source
    called = source.origin if isinstance(source, QuestionSource) else source.name
    records: dict[str, list[int]] = {}
    for index in range(len(source)):
        records.setdefault(called(index), []).append(part.start + index)
    return [records[n] for n in sorted(records, key=lambda n: hashlib.sha1(n.encode()).digest())]

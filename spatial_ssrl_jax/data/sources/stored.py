"""Record files as TFDS writes them: encoded images, perhaps with depth."""

import threading
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds

from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.common.fingerprint import hash_texts
from spatial_ssrl_jax.common.reading import READING, Reading
from spatial_ssrl_jax.common.text import error_line
from spatial_ssrl_jax.data.images import (
    check_pixels,
    image_size,
    open_oriented_image,
)
from spatial_ssrl_jax.data.sources.depthmap import DepthTarget, below_limit, fit_depth
from spatial_ssrl_jax.tasks.record import Record

DEPTH = "depth"
_HASHED = 64  # records that are hashed
_NAMES = ("name", "image/filename")  # our builder's, and COCO's in the catalogue


class EncodedRecords(Protocol):
    """Random access to encoded records."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> bytes: ...


class StoredSource:
    """Records of a TFDS data set.

    They are named by their index, so that naming them reads nothing.

    Args:
      spec: the SPEC as the user wrote it.
      prefix: precedes the index in a record's name.
      rows: random access to the records as TFDS encodes them; can be pickled.
      features: of the data set.
      inputs: files and folders that hold the records.
      reading: how images and depth are read.

    Raises:
      UserError: the data set has no image.
    """

    def __init__(
        self,
        spec: str,
        prefix: str,
        rows: EncodedRecords,
        features: tfds.features.FeatureConnector | None,
        inputs: tuple[str, ...],
        reading: Reading = READING,
    ):
        if not isinstance(features, tfds.features.FeaturesDict):
            raise UserError(
                f"source '{spec}': its records have no named features; use another one."
            )
        self.spec, self.prefix, self._rows, self.inputs = spec, prefix, rows, inputs
        self.reading = reading
        self._image = _image_key(spec, features)
        self._features = _select(features, self._image, DEPTH, *_NAMES)  # no other is decoded
        self._sized = _select(features, self._image)
        self.has_depth = DEPTH in features
        self.has_distances = self.has_depth and reading.depth != "relative-inverse"
        self._last = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_last"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._last = threading.local()

    def __len__(self) -> int:
        return len(self._rows)

    def fingerprint(self) -> str:
        step = -(-len(self) // _HASHED)
        return hash_texts([str(len(self)), *(self._bytes(i) for i in range(0, len(self), step))])

    def name(self, index: int) -> str:
        return f"{self.prefix}/{range(len(self))[index]:08d}"

    def size(self, index: int) -> tuple[int, int]:
        row = self._decode(self._sized, index)
        width, height = image_size(row[self._image], self.name(index))
        return height, width

    def __getitem__(self, index: int) -> Record:
        name, row = self.name(index), self._decode(self._features, index)
        encoded, transparency = row[self._image], self.reading.transparency
        image, orientation = open_oriented_image(encoded, name, transparency)
        path = next((row[key].decode() for key in _NAMES if key in row), name)
        target = DepthTarget(image.shape[:2], orientation, self.reading)
        depth = _depth(row[DEPTH], target, name) if self.has_depth else None
        return Record(image, depth, name, self.spec, path, turned=orientation != 1)

    def _bytes(self, index: int) -> bytes:
        """A record as it is stored; each thread caches its last one, as `size` precedes reading."""
        if getattr(self._last, "index", None) != index:
            try:
                self._last.bytes, self._last.index = self._rows[index], index
            except RuntimeError as error:  # ArrayRecord's, of a damaged file
                name = self.name(index)
                raise BadImage(f"{name}: cannot be read ({error_line(error)}).") from error
        return self._last.bytes

    def _decode(self, features: tfds.features.FeaturesDict, index: int) -> dict[str, Any]:
        """A record's features; its image stays encoded, to be decoded as those of folders are."""
        name, stored = self.name(index), self._bytes(index)
        encoded = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
        decoders = {key: tfds.decode.SkipDecoding() for key in encoded}
        try:
            row: Any = features.deserialize_example_np(stored, decoders=decoders)
            if DEPTH in encoded and self._image != DEPTH:
                which = f"the depth of {name}"
                check_pixels(image_size(row[DEPTH], which), which)
                row[DEPTH] = features[DEPTH].decode_example_np(row[DEPTH])
        except BadImage:
            raise
        except Exception as error:  # TFDS and its decoders raise nearly anything
            raise BadImage(f"{name}: cannot be decoded ({error_line(error)}).") from error
        return row


def _select(features: tfds.features.FeaturesDict, *names: str) -> tfds.features.FeaturesDict:
    """The features with one of the names."""
    return tfds.features.FeaturesDict({k: features[k] for k in names if k in features})


def _image_key(spec: str, features: tfds.features.FeaturesDict) -> str:
    """Name of the feature that holds the image: `image`, or the first image feature."""
    images = [key for key, f in features.items() if isinstance(f, tfds.features.Image)]
    if not images:
        raise UserError(
            f"source '{spec}': its records hold no image, only {', '.join(features)}; "
            "use another data set."
        )
    return "image" if "image" in images else images[0]


def _depth(values: np.ndarray, target: DepthTarget, name: str) -> np.ndarray:
    """[H, W] float32 with NaN where invalid, from any [H, W] or [H, W, 1]."""
    values = values[..., 0] if values.ndim == 3 else values
    return fit_depth(values.astype(np.float32), target, f"the depth of {name}", below_limit(values))

"""A TFDS builder that packs a folder of images, perhaps with depth, into ArrayRecord files."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from spatial_ssrl_jax.common.errors import BadImage
from spatial_ssrl_jax.data.sources.base import Source
from spatial_ssrl_jax.data.sources.diode import open_diode
from spatial_ssrl_jax.data.sources.folder import open_folder
from spatial_ssrl_jax.data.sources.megadepth import open_megadepth
from spatial_ssrl_jax.data.sources.nyu import open_nyu
from spatial_ssrl_jax.data.sources.rgbd import open_rgbd
from spatial_ssrl_jax.tasks.record import Record

KINDS = {
    "rgbd": open_rgbd,
    "coco": open_folder,
    "diode": open_diode,
    "megadepth": open_megadepth,
    "nyu": open_nyu,
}


class SsrlPictures(tfds.core.GeneratorBasedBuilder):
    """`ssrl_pictures/KIND`: name, image as its file holds it, depth as its source reads it.

    Depth is stored in float32 at the image's size with NaN where invalid, so that the data set
    equals the folder, to the bit.

    Args:
      source: to write; None to read a data set.
      kwargs: of TFDS's builder: `config` (a kind), `data_dir`, `file_format`, ….

    Attributes:
      skipped: reason of each bad image that was skipped.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=kind) for kind in KINDS]

    def __init__(self, *, source: Source | None = None, **kwargs: Any):
        self._source = source
        self.skipped: list[str] = []
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "name": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None,) * 2 + (3,)),
        }
        if self.builder_config is None or self.builder_config.name != "coco":
            features["depth"] = tfds.features.Tensor(
                shape=(None, None), dtype=np.float32, encoding="zlib"
            )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images of a folder, with depth where its kind has it.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # keeps the source's order; the pipeline shuffles
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        assert self._source is not None  # only to read
        return {"train": self._generate_examples(self._source)}

    def _generate_examples(self, source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(len(source)):
            try:
                record = source[index]
            except BadImage as reason:
                self.skipped.append(str(reason))
                continue
            # Encoded bytes: TFDS would need TensorFlow to encode an array.
            row: dict[str, Any] = {"name": record.name, "image": _encoded(record)}
            yield index, row | ({} if record.depth is None else {"depth": record.depth})


def _encoded(record: Record) -> bytes:
    """The bytes of a record's image file.

    It is a PNG of the image where that is no file of its own, or where EXIF turns it and its depth
    would lack that.
    """
    if Path(record.path).is_file() and (record.depth is None or not record.turned):
        return Path(record.path).read_bytes()
    buffer = io.BytesIO()
    Image.fromarray(record.image).save(buffer, "PNG")
    return buffer.getvalue()

"""`tfds:NAME[:SPLIT][@DATA_DIR]`: a TFDS data set in ArrayRecord files, read without TensorFlow.

NAME is the one that `prepare` prints, or any prepared data set of the catalogue that holds images,
such as coco/2017. One that is not in DATA_DIR (TFDS's own default unless given) is downloaded and
prepared, if its builder needs no TensorFlow for it. SPLIT is `train` unless given, and may be a
slice such as train[:10%]. DATA_DIR may begin with gs://.
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.json_file import FETCH
from spatial_ssrl_jax.common.paths import NEEDS_GCS, check_regular, in_bucket
from spatial_ssrl_jax.common.reading import READING, Reading
from spatial_ssrl_jax.common.text import error_line
from spatial_ssrl_jax.data.sources.base import Source

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder

_ARGUMENT = re.compile(
    r"(?P<name>[^:@]+(:(\d+|\*)\.(\d+|\*)\.(\d+|\*))?)(:(?P<split>[^@]+))?(@(?P<folder>.+))?"
)


def open_tfds(spec: str, argument: str, reading: Reading = READING) -> Source:
    """Opens a split; raises `UserError` if there is no such data set or it cannot be read."""
    import tensorflow_datasets as tfds  # half a second, which other sources do not need

    from spatial_ssrl_jax.data.sources.stored import StoredSource

    match = _ARGUMENT.fullmatch(argument)
    if match is None:
        raise UserError(
            f"source '{spec}' cannot be understood; write tfds:NAME[:SPLIT][@DATA_DIR]."
        )
    split = match["split"] or "train"
    try:
        builder = _builder(match["name"], match["folder"])
        method = tfds.decode.DeserializeMethod.RAW_BYTES
        rows = builder.as_data_source(
            split,  # pyright: ignore[reportCallIssue]  # TFDS's decorator hides the parameter
            deserialize_method=method,
        )
    except UserError:
        raise
    except Exception as error:  # TFDS raises many kinds, with texts of many lines
        if isinstance(error, ImportError) and (match["folder"] or "").startswith("gs://"):
            raise UserError(f"source '{spec}': {NEEDS_GCS}.") from error
        raise UserError(
            f"source '{spec}' cannot be opened ({error_line(error)}): check name, split and "
            "DATA_DIR, or write it with the prepare command."
        ) from error
    if not len(rows):
        raise UserError(f"source '{spec}': its split {split} holds no record; name another split.")
    name, folder = f"{builder.info.full_name}/{split}", os.fspath(builder.data_path)
    return StoredSource(spec, name, rows, builder.info.features, (folder,), reading)


def _builder(name: str, folder: str | None) -> "DatasetBuilder":
    """A prepared data set from its files alone, as the code of many builders needs TensorFlow."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    if folder and not in_bucket(folder):
        for path in (Path(folder) / name).rglob("*"):
            if not path.is_dir():  # TFDS would wait for a pipe
                check_regular(path, FETCH)
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError:
        builder = tfds.builder(name, data_dir=folder, file_format="array_record")
    if not builder.is_prepared():
        builder.download_and_prepare()
    return builder

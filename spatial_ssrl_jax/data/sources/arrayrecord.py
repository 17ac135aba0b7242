"""`arrayrecord:GLOB`: ArrayRecord files that TFDS wrote, read in place, from gs:// too.

The folder of the first file also holds `features.json`, as TFDS writes it.
"""

import os

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.json_file import FETCH
from spatial_ssrl_jax.common.paths import NEEDS_GCS, check_regular
from spatial_ssrl_jax.common.reading import READING, Reading
from spatial_ssrl_jax.common.text import error_line
from spatial_ssrl_jax.data.sources.base import Source


def open_arrayrecord(spec: str, pattern: str, reading: Reading = READING) -> Source:
    """Opens the files that match; raises `UserError` if there are none, or no `features.json`."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    from etils import epath

    from spatial_ssrl_jax.data.sources.stored import StoredSource

    folder, _, names = pattern.rpartition("/")
    try:
        files = sorted(os.fspath(file) for file in epath.Path(folder or ".").glob(names or "*"))
    except ImportError as error:
        if not pattern.startswith("gs://"):
            raise UserError(f"source '{spec}' cannot be read ({error}): copy it here.") from error
        raise UserError(f"source '{spec}': {NEEDS_GCS}.") from error
    if not files:
        raise UserError(f"source '{spec}': no file matches; expected ArrayRecord files by TFDS.")
    folder = epath.Path(files[0]).parent
    if not (folder / "features.json").exists():
        raise UserError(
            f"source '{spec}': {folder / 'features.json'} is missing: copy it from where the files "
            "were written."
        )
    for path in (folder / "features.json", *files):
        check_regular(path, FETCH)
    try:
        features = tfds.features.FeaturesDict.from_config(os.fspath(folder))
        rows = ArrayRecordDataSource(files)
        count = len(rows)
    except Exception as error:  # damaged files
        raise UserError(
            f"source '{spec}' cannot be opened ({error_line(error)}): write it anew."
        ) from error
    if not count:
        raise UserError(f"source '{spec}': its files hold no record; write them anew.")
    prefix = os.path.basename(files[0]).partition(".array_record")[0]
    inputs = (*files, os.fspath(folder))
    return StoredSource(spec, prefix, rows, features, inputs, reading)

"""TensorBoard's event file; for a run in a bucket, a local file that is copied there."""

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue] - protobuf makes it at import
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue] - as above
)
from tensorboardX.summary import scalar

from spatial_ssrl_jax.common.paths import in_bucket

_COPY_SECONDS = 60


class TensorBoardWriter:
    """Writes the metrics of one start of a run to an event file of its own.

    In a bucket the whole file is copied at most once a minute and at the end: after a kill
    TensorBoard lacks the last minute, which `metrics/` has.

    Args:
      folder: the run's folder.
      first: the next step; TensorBoard drops this and later steps of earlier files.
    """

    def __init__(self, folder: epath.Path, first: int):
        self._folder = folder
        self._local = tempfile.TemporaryDirectory() if in_bucket(folder) else None
        place = self._local.name if self._local else os.fspath(folder)
        # Not SummaryWriter: a full disk ends its thread, and later calls block forever.
        self._writer = EventsWriter(os.path.join(place, "events"))
        self._writer.write_event(Event(step=first, session_log=SessionLog(status=SessionLog.START)))
        self._copied = time.monotonic()

    def write(self, step: int, when: float, values: Mapping[str, float]) -> None:
        """Writes one step's metrics; `when` is in seconds since 1970."""
        for name, value in values.items():
            self._writer.write_event(Event(wall_time=when, step=step, summary=scalar(name, value)))
        self._writer.flush()
        if time.monotonic() - self._copied > _COPY_SECONDS:
            self._copy()

    def close(self) -> None:
        self._writer.close()
        self._copy()
        if self._local is not None:
            self._local.cleanup()

    def _copy(self) -> None:
        if self._local is None:
            return
        (path,) = Path(self._local.name).iterdir()
        epath.Path(path).copy(self._folder / path.name, overwrite=True)
        self._copied = time.monotonic()

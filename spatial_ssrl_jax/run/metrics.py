"""A run's figures: every name there is, `metrics.jsonl`, and TensorBoard."""

import difflib
import json
import math
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from spatial_ssrl_jax.errors import UserError

FILE = "metrics.jsonl"

# `<task>` stands for a task's name. What depends on the clock or the machine is under perf/ or
# memory/; all the rest is equal in two equal runs.
NAMES = (
    "reward/overall_mean",
    "reward/overall_std",
    "reward/accuracy_mean",
    "reward/accuracy_std",
    "reward/format_mean",
    "reward/format_std",
    "task/<task>/reward",
    "task/<task>/accuracy",
    "task/<task>/format",
    "task/<task>/count",
    "advantage/mean",
    "advantage/std",
    "advantage/zero_variance_share",
    "loss/total",
    "loss/policy",
    "loss/kl",
    "loss/sft",
    "kl/mean",
    "policy/entropy",
    "policy/ratio_mean",
    "policy/clip_low",
    "policy/clip_high",
    "policy/clip_dual",
    "response/length_mean",
    "response/length_min",
    "response/length_max",
    "response/clipped_share",
    "prompt/length_mean",
    "prompt/dropped",
    "optim/learning_rate",
    "optim/gradient_norm",
    "optim/skipped",
    "mismatch/logprob_mean",
    "mismatch/logprob_max",
    "mismatch/correction_mean",
    "prompt/refilled",
    "heldout/<task>/accuracy_greedy",
    "heldout/<task>/accuracy_sampled",
    "heldout/<task>/format",
    "heldout/<task>/reward",
    "perf/step_seconds",
    "perf/rollout_seconds",
    "perf/reward_seconds",
    "perf/refill_seconds",
    "perf/reference_seconds",
    "perf/update_seconds",
    "perf/update_padding_share",
    "perf/input_wait_seconds",
    "perf/tokens_per_second",
    "perf/rollout_tokens_per_second",
    "perf/compilations",
    "memory/host_bytes",
    "memory/device_bytes",
)
_KNOWN = re.compile("|".join(re.escape(n).replace("<task>", r"\w+") for n in NAMES))


class MetricsWriter:
    """Appends one line a step to `metrics.jsonl`, and the same to TensorBoard.

    Args:
      workdir: the run's folder.
      resume_step: the restored step; later lines are removed, all at once.
    """

    def __init__(self, workdir: Path, resume_step: int = 0):
        self._path = Path(workdir) / FILE
        if self._path.is_file():
            _truncate(self._path, resume_step)
        self._file = self._path.open("a")
        # Not SummaryWriter: its thread dies of a full disk, and the next calls wait for it forever.
        self._events = EventsWriter(str(Path(workdir) / "events"))
        started = SessionLog(status=SessionLog.START)  # TensorBoard drops later steps seen before
        self._events.write_event(Event(step=resume_step + 1, session_log=started))

    def write(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Writes one step.

        Raises:
          ValueError: a name is not in `NAMES`.
          UserError: the files cannot be written.
        """
        for name in values:
            if not _KNOWN.fullmatch(name):
                near = difflib.get_close_matches(name, NAMES, n=1)
                raise ValueError(f"unknown metric {name}; nearest: {near}")
        row = {"step": step, "stage": stage, "time": round(time.time(), 3)}
        row |= {k: _number(values[k]) for k in sorted(values)}
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            for name, value in values.items():
                if math.isfinite(value):
                    summary = scalar(name, value)
                    event = Event(wall_time=row["time"], step=step, summary=summary)
                    self._events.write_event(event)
            self._events.flush()
        except OSError as error:
            with suppress(OSError):
                self.close()
            raise UserError(
                f"step {step} could not be written to {self._path} ({error.strerror or error}): "
                "free space there; the same command then goes on after the newest checkpoint."
            ) from error

    def close(self) -> None:
        self._file.close()
        self._events.close()


def _number(value: float) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _truncate(path: Path, step: int) -> None:
    """Removes the lines behind `step`; with 0 all of them, since step 0 is measured again."""
    kept = [row for row in read_metrics(path.parent) if 0 < step >= row["step"]]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
    os.replace(partial, path)


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Every whole line of a run's `metrics.jsonl`; a line cut off by a kill is left out."""
    path = Path(workdir) / FILE
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows

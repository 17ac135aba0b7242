"""A run's metrics: their names, and writing them to `metrics.jsonl`, TensorBoard and W&B.

A bucket has no append: there the lines are in `metrics/part_000001.jsonl` and so on, of a hundred
steps each, and the newest part is rewritten with every line.
"""

import difflib
import json
import math
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from etils import epath

from spatial_ssrl_jax.common.bounds import Bounds
from spatial_ssrl_jax.common.errors import UserError, write_failure
from spatial_ssrl_jax.common.json_file import as_object, parse_json
from spatial_ssrl_jax.common.paths import in_bucket, read_files, write_atomic
from spatial_ssrl_jax.monitoring.tensorboard import TensorBoardWriter
from spatial_ssrl_jax.monitoring.wandb_run import WandbRun

METRICS_FILE = "metrics.jsonl"
PARTS_FOLDER = "metrics"
_PART_STEPS = 100
# What a line may hold, so that a damaged one is not taken for metrics.
_STEPS, _TIMES = Bounds(min=0, max=2**31), Bounds(min=0, max=2**37)
_VALUES = Bounds(min=-1e100, max=1e100)

# `<task>`, `<benchmark>` and `<part>`, of `reward.function`, stand for a name. Metrics that depend
# on the clock or the machine are under perf/ or memory/; all others are equal in two equal runs.
NAMES = (
    "reward/overall_mean",
    "reward/overall_std",
    "reward/accuracy_mean",
    "reward/accuracy_std",
    "reward/format_mean",
    "reward/format_std",
    "reward/part/<part>",
    "reward/failed_share",
    "task/<task>/reward",
    "task/<task>/accuracy",
    "task/<task>/format",
    "task/<task>/reward_std",
    "task/<task>/accuracy_std",
    "task/<task>/format_std",
    "task/<task>/count",
    "advantage/mean",
    "advantage/std",
    "advantage/zero_variance_share",
    "loss/total",
    "loss/policy",
    "loss/kl",
    "loss/sft",
    "kl/mean",
    "kl/coef",
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
    "prompt/dropped_share",
    "optim/learning_rate",
    "optim/gradient_norm",
    "optim/skipped",
    "mismatch/logprob_mean",
    "mismatch/logprob_max",
    "mismatch/correction_mean",
    "mismatch/correction_clipped",
    "prompt/refilled",
    "heldout/<task>/accuracy_greedy",
    "heldout/<task>/accuracy_sampled",
    "heldout/<task>/accuracy_grey",
    "heldout/<task>/chance",
    "heldout/<task>/format",
    "heldout/<task>/reward",
    "benchmark/<benchmark>/score",
    "benchmark/<benchmark>/unparsed_share",
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
    "perf/repeated_tokens_per_second",  # the prompt once a sample
    "perf/samples_per_second",
    "perf/prefill_padding_share",
    "perf/decode_steps",
    "perf/decode_occupancy",
    "perf/cache_occupancy",
    "perf/useful_flops",
    "perf/flops_per_second",
    "perf/mfu",
    "perf/compilations",
    "perf/compile_seconds",
    "perf/compilations_read",
    "perf/model_programs",
    "perf/host_gap_seconds",
    "memory/host_bytes",
    "memory/device_bytes",
)
_KNOWN = re.compile("|".join(re.sub("<[a-z]+>", r"\\w+", re.escape(n)) for n in NAMES))


class MetricsWriter:
    """Writes one line a step to the run's folder, and the same to TensorBoard and W&B.

    Args:
      workdir: the run's folder; may be `gs://…`.
      resume_step: the restored step; later lines are removed, atomically for each file.
      in_parts: write parts; by default in a bucket.
      tracker: W&B, or None.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        resume_step: int = 0,
        in_parts: bool | None = None,
        tracker: WandbRun | None = None,
    ):
        self._folder = epath.Path(workdir)
        self._in_parts = in_bucket(workdir) if in_parts is None else in_parts
        self._part = _truncate(self._folder, resume_step)
        self._tracker = tracker
        self._file = None if self._in_parts else (self._folder / METRICS_FILE).open("a")
        self._events = TensorBoardWriter(self._folder, resume_step + 1)

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Writes one step's metrics; in the file, a value that is not finite is null.

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
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        try:
            self._append(step, json.dumps(row) + "\n")
            self._events.write(step, row["time"], finite)
        except Exception as error:
            failure = write_failure(error)
            if failure is None:
                raise
            why, fix = failure
            with suppress(Exception):  # the cause is reported below
                self.close()
            place = self._folder / (PARTS_FOLDER if self._in_parts else METRICS_FILE)
            raise UserError(
                f"step {step} could not be written to {place} ({why}): {fix}; the same command "
                "then resumes after the newest checkpoint."
            ) from error
        if self._tracker is not None:
            self._tracker.log(step, finite)

    def _append(self, step: int, line: str) -> None:
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            return
        number = step // _PART_STEPS
        self._part = (self._part if _last_step(self._part) // _PART_STEPS == number else "") + line
        write_atomic(_part_path(self._folder, number), self._part)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._events.close()
        if self._tracker is not None:
            self._tracker.finish()


def _number(value: float) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _part_path(folder: epath.Path, number: int) -> epath.Path:
    return folder / PARTS_FOLDER / f"part_{number + 1:06d}.jsonl"


def _last_step(text: str) -> int:
    return json.loads(text.splitlines()[-1])["step"] if text else -1


def _truncate(folder: epath.Path, step: int) -> str:
    """Removes the lines after `step`; with 0 all lines, since step 0 is measured again.

    Returns:
      The text of the newest file that remains.
    """
    text, files = "", _files(folder)
    for path, rows in zip(files, _rows(files), strict=True):
        kept = [row for row in rows if 0 < step >= row["step"]]
        if not kept and path.name != METRICS_FILE:
            path.unlink()
            continue
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_atomic(path, text)
    return text


def _files(folder: epath.Path) -> list[epath.Path]:
    """The files with a run's lines, in the order of the steps."""
    whole, parts = folder / METRICS_FILE, folder / PARTS_FOLDER
    found = [whole] if whole.exists() else []
    return found + (sorted(parts.glob("part_*.jsonl")) if parts.exists() else [])


def _rows(files: list[epath.Path]) -> list[list[dict[str, Any]]]:
    """The complete lines of each file."""
    return [
        [row for line in data.splitlines() if (row := _row(line)) is not None]
        for data in read_files(files)
    ]


def _row(line: bytes) -> dict[str, Any] | None:
    """The metrics of a line; None where it is damaged, such as by a kill while it was written."""
    try:
        row = as_object(parse_json(line, METRICS_FILE), METRICS_FILE)
        row.get("step", int, bounds=_STEPS)
        row.get("stage", str)
        row.get("time", float, bounds=_TIMES)
        for name in row.values.keys() - {"step", "stage", "time"}:
            row.find(name, float, _VALUES)
    except UserError:
        return None
    return dict(row.values)


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a run's metrics in the order of steps, without those that are damaged."""
    rows = [row for part in _rows(_files(epath.Path(workdir))) for row in part]
    return sorted(rows, key=lambda row: row["step"])

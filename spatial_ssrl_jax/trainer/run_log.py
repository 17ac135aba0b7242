"""What is written for people during a run: sampled rollouts and the report.

Training does not end when they cannot be written: it is said, once until it works again.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from spatial_ssrl_jax.common.errors import write_failure
from spatial_ssrl_jax.config.load import to_dict
from spatial_ssrl_jax.data.pipeline import Batch
from spatial_ssrl_jax.eval.predictions import write_results
from spatial_ssrl_jax.eval.questions import Prediction
from spatial_ssrl_jax.eval.scoring.scores import Scores
from spatial_ssrl_jax.monitoring.rollout_samples import FOLDER, write_rollouts
from spatial_ssrl_jax.rl.step_metrics import ScoredRollout
from spatial_ssrl_jax.trainer.context import Run
from spatial_ssrl_jax.trainer.report import write_report

BENCHMARK = "benchmark"  # folder of the answers to `eval.benchmark`
# What a GRPO step trained on: prompts, and their rollout with rewards.
Sampled = tuple[Batch, ScoredRollout]


def log_step(run: Run, number: int, first: int, sampled: Sampled | None) -> None:
    """Writes a sample of rollouts and the report when they are due.

    Args:
      run: the run.
      number: the run's step.
      first: steps before this stage.
      sampled: what a GRPO step trained on; None in the cold start.
    """
    log = run.config.log
    if sampled is not None and log.rollouts_every and (number - first) % log.rollouts_every == 0:
        rows = list(_rollout_rows(*sampled, log.rollouts_count))
        _write(run, FOLDER, lambda: write_rollouts(run.workdir, number, rows))
    if number % log.report_every == 0:
        refresh_report(run)


def log_benchmark(run: Run, number: int, records: Sequence[Prediction], scores: Scores) -> None:
    """Writes what a benchmark was answered at a step, as `evaluate` leaves it."""
    folder = run.workdir / BENCHMARK / f"step_{number:06d}"
    _write(run, BENCHMARK, lambda: write_results(folder, records, scores))


def _rollout_rows(batch: Batch, scored: ScoredRollout, count: int) -> Iterator[dict[str, Any]]:
    rollout = scored.rollout
    for b, item in enumerate(batch.items[:count]):
        example = item.example
        yield {
            "task": example.task,
            "kind": example.kind,
            "question": example.question,
            "answer": example.answer,
            "images": [np.asarray(image) for image in example.images],
            "source": example.source,
            "responses": [
                {
                    "text": scored.texts[b][g],
                    "reward": reward.overall,
                    "accuracy": reward.accuracy_weight,
                    "format": reward.format,
                    "advantage": float(scored.advantage[b, g]),
                    "length": int(rollout.length[b, g]),
                    "finished": bool(rollout.finished[b, g]),
                }
                for g, reward in enumerate(scored.rewards[b])
            ],
        }


def refresh_report(run: Run) -> None:
    """Writes `report.html` anew from what the folder holds."""
    config = to_dict(run.config)
    _write(run, "report.html", lambda: write_report(run.workdir, config, config["name"]))


def _write(run: Run, what: str, write: Callable[[], object]) -> None:
    try:
        write()
    except Exception as error:
        why, mend = write_failure(error)
        if why is None:
            raise
        if what not in run.unwritten:
            run.progress.say(
                f"{run.workdir / what} cannot be written ({why}): training continues without; {mend}"
            )
        run.unwritten.add(what)
    else:
        run.unwritten.discard(what)

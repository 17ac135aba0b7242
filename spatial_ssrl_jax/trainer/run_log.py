"""Files for people, written during a run: sampled rollouts, benchmark answers and the report.

A failed write does not end the training: it is reported once until a write succeeds again.
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
# Prompts that a GRPO step trains on, and their rollout with rewards.
Sampled = tuple[Batch, ScoredRollout]


def log_step(run: Run, number: int, first: int, sampled: Sampled | None) -> None:
    """Writes a sample of rollouts and the report when they are due.

    Args:
      run: the run.
      number: the run's step.
      first: steps before this stage.
      sampled: prompts and rollout of a GRPO step; None in SFT.
    """
    log = run.config.log
    if sampled is not None:
        _say_failures(run, number, sampled[1])
    if sampled is not None and log.rollouts_every and (number - first) % log.rollouts_every == 0:
        rows = list(_rollout_rows(*sampled, log.rollouts_count))
        _write(run, FOLDER, lambda: write_rollouts(run.workdir, number, rows))
    if number % log.report_every == 0:
        refresh_report(run)


def _say_failures(run: Run, number: int, scored: ScoredRollout) -> None:
    """Says which response of a step has no reward, the first of them."""
    failures = [r.failure for group in scored.rewards for r in group if r.failure]
    if failures:
        run.progress.say(
            f"step {number}: {len(failures)} responses have no reward, so they earn 0; the first: "
            f"{failures[0]}"
        )


def log_benchmark(run: Run, number: int, predictions: Sequence[Prediction], scores: Scores) -> None:
    """Writes the answers to a benchmark at a step, in the format of `evaluate`."""
    folder = run.workdir / BENCHMARK / f"step_{number:06d}"
    _write(run, BENCHMARK, lambda: write_results(folder, predictions, scores))


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
                    "accuracy": reward.accuracy,
                    "format": reward.format,
                    **({"parts": dict(reward.parts)} if reward.parts else {}),
                    **({"failure": reward.failure} if reward.failure else {}),
                    "advantage": float(scored.advantage[b, g]),
                    "length": int(rollout.length[b, g]),
                    "finished": bool(rollout.finished[b, g]),
                }
                for g, reward in enumerate(scored.rewards[b])
            ],
        }


def refresh_report(run: Run) -> None:
    """Rewrites `report.html` from the files in the run's folder."""
    config = to_dict(run.config)
    _write(run, "report.html", lambda: write_report(run.workdir, config, config["name"]))


def _write(run: Run, what: str, write: Callable[[], object]) -> None:
    try:
        write()
    except Exception as error:
        failure = write_failure(error)
        if failure is None:
            raise
        why, fix = failure
        if what not in run.unwritten:
            run.progress.say(
                f"{run.workdir / what} cannot be written ({why}): training continues; {fix}"
            )
        run.unwritten.add(what)
    else:
        run.unwritten.discard(what)

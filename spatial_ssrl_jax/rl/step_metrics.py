"""A step's metrics, over the rows of all processes: prompts, rewards, advantages, lengths."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.items import Item
from spatial_ssrl_jax.data.pipeline import Batch
from spatial_ssrl_jax.parallel.collectives import all_gather
from spatial_ssrl_jax.rl.rewards import MAX_PARTS, Reward
from spatial_ssrl_jax.rollout.engine import Rollout
from spatial_ssrl_jax.tasks import questions
from spatial_ssrl_jax.tasks.example import Example

Metrics = dict[str, float]
Columns = dict[str, np.ndarray]
_REWARDS = ("overall", "accuracy", "format")
_PART, _TASK = "part/", "task/"  # before the name of a part of the reward, and of a task


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with its texts, rewards and advantages.

    Attributes:
      rollout: what was sampled.
      texts: B lists of G responses.
      rewards: B lists of G rewards.
      advantage: [B, G] float32.
      updated: [B] bool, the groups that the updates compute, as the others have no gradient; None
        before the updates.
    """

    rollout: Rollout
    texts: list[list[str]]
    rewards: list[list[Reward]]
    advantage: np.ndarray
    updated: np.ndarray | None = None


def prompt_rows(batch: Batch) -> Columns:
    """What the metrics need of each prompt; arrays with [b] rows."""
    return {
        "index": batch.index,
        "prompt_length": np.array([len(prompt.ids) for prompt in batch.prompts]),
        "dropped": np.array([len(item.skipped) for item in batch.items]),
    }


def rollout_rows(items: Sequence[Item], scored: ScoredRollout) -> Columns:
    """What the metrics need of each group; arrays [b] and [b, G].

    Parts of the reward are NaN where a response has none.

    Raises:
      UserError: `reward.function` names too many parts.
    """
    names = _all_names(name for item in items for name in _names(item.example))
    tasks = {
        _TASK + name: np.array([name in _names(item.example) for item in items]) for name in names
    }
    rewards = {
        name: np.array([[getattr(r, name) for r in group] for group in scored.rewards])
        for name in _REWARDS
    }
    for name in _part_names(scored.rewards):
        values = [[r.parts.get(name, np.nan) for r in group] for group in scored.rewards]
        rewards[_PART + name] = np.array(values)
    return (
        rewards
        | tasks
        | {
            "failed": np.array([[bool(r.failure) for r in group] for group in scored.rewards]),
            "advantage": scored.advantage,
            "length": scored.rollout.length,
            "finished": scored.rollout.finished,
        }
    )


def _part_names(rewards: list[list[Reward]]) -> list[str]:
    """The parts of the rewards on any process, each of which is a metric."""
    names = _all_names(name for group in rewards for reward in group for name in reward.parts)
    if len(names) > MAX_PARTS:
        raise UserError(
            f"reward.function names {len(names)} parts in one step ({', '.join(names[:3])}, …); "
            f"expected at most {MAX_PARTS}: name the same few for every response."
        )
    return names


def _names(example: Example) -> tuple[str, ...]:
    """What an example's metrics go by: its task; and the name that a question of one's own has."""
    if example.task == questions.TASK.name and example.kind:
        return example.task, f"{example.task}_{example.kind}"
    return (example.task,)


def _all_names(names: Iterable[str]) -> list[str]:
    """The names on any process, sorted."""
    text = "\n".join(sorted(set(names))).encode()
    size = int(all_gather(np.array([len(text)])).max())
    rows = all_gather(np.frombuffer(text.ljust(size), np.uint8)[None])
    return sorted({name for row in rows for name in row.tobytes().decode().split()})


def gather_ordered(rows: Columns) -> Columns:
    """The rows of every process in the order of the step, whatever the number of processes."""
    rows = all_gather(rows)
    order = np.argsort(rows["index"])
    return {name: value[order] for name, value in rows.items()}


def prompt_metrics(rows: Columns) -> Metrics:
    """How long the prompts are, and how many records gave none."""
    length, dropped = rows["prompt_length"], float(rows["dropped"].sum())
    return {
        "prompt/length_mean": float(length.mean()),
        "prompt/dropped": dropped,
        "prompt/dropped_share": dropped / (dropped + len(length)),
    }


def rollout_metrics(rows: Columns) -> Metrics:
    """Rewards, advantages and lengths of a step, over all and per task."""
    metrics: Metrics = {}
    for name in _REWARDS:
        metrics[f"reward/{name}_mean"] = float(rows[name].mean())
        metrics[f"reward/{name}_std"] = float(rows[name].std())
    for name, values in rows.items():
        if name.startswith(_PART) and np.isfinite(values).any():
            metrics[f"reward/{name}"] = float(np.nanmean(values))
    for column, mine in rows.items():
        if column.startswith(_TASK):
            for key, name in (("overall", "reward"), ("accuracy",) * 2, ("format",) * 2):
                metrics[f"{column}/{name}"] = float(rows[key][mine].mean())
                metrics[f"{column}/{name}_std"] = float(rows[key][mine].std())
            metrics[f"{column}/count"] = float(mine.sum())
    overall, length = rows["overall"], rows["length"]
    return metrics | {
        "reward/failed_share": float(rows["failed"].mean()),
        "advantage/mean": float(rows["advantage"].mean()),
        "advantage/std": float(rows["advantage"].std()),
        "advantage/zero_variance_share": float(np.mean(overall.max(1) == overall.min(1))),
        "response/length_mean": float(length.mean()),
        "response/length_min": float(length.min()),
        "response/length_max": float(length.max()),
        "response/clipped_share": float(np.mean(~rows["finished"])),
    }

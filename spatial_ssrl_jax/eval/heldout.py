"""Held-out scores of the pretext tasks: greedy and sampled accuracy, format and reward."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from spatial_ssrl_jax.config.schema import EvalSettings, RolloutSettings
from spatial_ssrl_jax.data.batching import prompt_sizes
from spatial_ssrl_jax.data.items import Item
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.inference.policy import Policy
from spatial_ssrl_jax.parallel.collectives import all_gather
from spatial_ssrl_jax.rl.bucketing import BatchSlice, Buckets, bucket_by_length
from spatial_ssrl_jax.rl.scorer import SampledGroup, Scorer
from spatial_ssrl_jax.rollout.engine import Rollout
from spatial_ssrl_jax.rollout.sampling import Sampling

HeldoutTable = dict[str, dict[str, float]]


@dataclass(frozen=True)
class HeldoutEval:
    """Fixed held-out examples of every task, and how they are answered and scored.

    Attributes:
      items: held-out items by task, at least one of each.
      buckets: sizes that programs are compiled for.
      settings: the config's `eval` section.
      rollout: the config's `rollout` section.
      scorer: rewards responses.
      temperature: the training temperature.
    """

    items: dict[str, list[Item]]
    buckets: Buckets
    settings: EvalSettings
    rollout: RolloutSettings
    scorer: Scorer
    temperature: float

    def measure(self, policy: Policy, trained: Sequence[str], seed: int) -> HeldoutTable:
        """Scores every held-out example, greedily and sampled at the training temperature.

        Returns:
          `{task: {"accuracy_greedy", "accuracy_sampled", "format", "reward", "count"}, "mean":
          likewise}`; the mean is over the tasks in `trained`. Format and reward are of the samples.
        """
        table, first = {}, 0
        rewards = self._rewards(policy, seed)
        for task, items in self.items.items():
            rows = rewards[first : first + len(items)]
            first += len(items)
            overall, accuracy, formatted = rows[:, :-1].mean(axis=(0, 1))
            table[task] = {
                "accuracy_greedy": float(rows[:, -1, 1].mean()),
                "accuracy_sampled": float(accuracy),
                "format": float(formatted),
                "reward": float(overall),
                "count": len(items),
            }
        rows = [table[t] for t in trained if t in table]
        if rows:
            table["mean"] = {
                k: float(np.mean([r[k] for r in rows])) for k in rows[0] if k != "count"
            }
            table["mean"]["count"] = sum(r["count"] for r in rows)
        return table

    def _rewards(self, policy: Policy, seed: int) -> np.ndarray:
        """[items, samples + 1, 3] float64 rewards: overall, accuracy, format.

        Prompts of all tasks are bucketed together and prefilled once; the last response is greedy.
        """
        items = [item for group in self.items.values() for item in group]
        index = np.concatenate([np.arange(len(group)) for group in self.items.values()])
        size, count = self.settings.batch_prompts, len(items)
        rows = size // jax.process_count()
        first = rows * jax.process_index()
        # The last item fills the last batch.
        filled = np.minimum(np.arange(-(-count // size) * size), count - 1)
        prompts = [items[i].prompt for i in filled]
        rewards = np.zeros((len(filled), self.settings.samples + 1, 3))
        for batch in bucket_by_length(prompt_sizes(prompts), size, self.buckets):
            own = BatchSlice(batch.rows[first : first + rows], batch.shape)
            numbers = filled[own.rows]
            rollout = policy.engine.generate(
                policy.params,
                policy.weights,
                [policy.layout.put_batch(own.pad(prompts))],
                group_size=self.settings.samples + 1,
                max_new_tokens=self.rollout.max_new_tokens,
                key=jax.random.fold_in(jax.random.key(seed), 2**31 - 1),
                prompt_index=[policy.layout.put_batch(index[numbers].astype(np.int32))],
                sampling=Sampling(self.temperature, greedy_last=True),
            )
            scored = self.scorer.score(
                [_group(policy.processor, items[n], rollout, row) for row, n in enumerate(numbers)]
            )
            values = [[(r.overall, r.accuracy, r.format) for r in group] for group in scored]
            rewards[batch.rows] = all_gather(np.array(values))
        return rewards[:count]


def _group(processor: Processor, item: Item, rollout: Rollout, row: int) -> SampledGroup:
    """The responses of one row of a rollout."""
    lengths = rollout.length[row].tolist()
    texts = [
        processor.decode(ids[:length])
        for ids, length in zip(rollout.tokens[row], lengths, strict=True)
    ]
    return SampledGroup(item.example, texts, lengths)

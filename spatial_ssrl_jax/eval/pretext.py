"""Held-out figures of the pretext tasks: greedy and sampled accuracy, form and reward."""

from collections.abc import Sequence
from dataclasses import dataclass

import grain
import jax
import numpy as np

from spatial_ssrl_jax.config import EvalSettings, GrpoSettings, RolloutSettings
from spatial_ssrl_jax.data.pipeline import Collate, Item
from spatial_ssrl_jax.data.prompts import Processor
from spatial_ssrl_jax.learn.batch import take_rows
from spatial_ssrl_jax.learn.reward import score
from spatial_ssrl_jax.qwen2_5_vl.model import Params
from spatial_ssrl_jax.rollout.engine import Engine
from spatial_ssrl_jax.rollout.sampling import GREEDY, Sampling
from spatial_ssrl_jax.run.mesh import Layout

Table = dict[str, dict[str, float]]


@dataclass(frozen=True)
class PretextEval:
    """Fixed held-out examples of every task, and what it takes to ask them.

    Attributes:
      items: held-out items by task.
      engine, processor, layout: ask and decode.
      collate: pads prompts.
      settings: the config's `eval` section.
      rollout: the config's `rollout` section.
      grpo: the config's `grpo` section, for the training temperature and the reward.
    """

    items: dict[str, list[Item]]
    engine: Engine
    processor: Processor
    layout: Layout
    collate: Collate
    settings: EvalSettings
    rollout: RolloutSettings
    grpo: GrpoSettings

    def measure(self, params: Params, trained: Sequence[str], seed: int) -> Table:
        """Asks every held-out question greedily and sampled at the training temperature.

        Returns:
          `{task: {"accuracy_greedy", "accuracy_sampled", "format", "reward", "count"}, "mean":
          {…}}`; format and reward are of the sampled responses, `mean` is over trained tasks.
        """
        weights = self.engine.fill(params)
        table: Table = {}
        for task, items in self.items.items():
            greedy = self._ask(params, weights, items, 1, GREEDY, seed)
            drawn = Sampling(self.grpo.temperature)
            sampled = self._ask(params, weights, items, self.settings.samples, drawn, seed)
            table[task] = {
                "accuracy_greedy": float(np.mean([r.accuracy for r in greedy])),
                "accuracy_sampled": float(np.mean([r.accuracy for r in sampled])),
                "format": float(np.mean([r.format for r in sampled])),
                "reward": float(np.mean([r.overall for r in sampled])),
                "count": len(items),
            }
        rows = [table[t] for t in trained if t in table]
        if rows:
            table["mean"] = {
                k: float(np.mean([r[k] for r in rows])) for k in rows[0] if k != "count"
            }
            table["mean"]["count"] = sum(r["count"] for r in rows)
        return table

    def _ask(self, params, weights, items, group: int, sampling: Sampling, seed: int) -> list:
        rewards = []
        size = self.settings.prompts
        for start in range(0, len(items), size):
            part = items[start : start + size]
            padded = part + [part[-1]] * (size - len(part))
            batch = self.collate(list(enumerate(padded, start)))
            rollout = self.engine.generate(
                params,
                weights,
                self.layout.put_batch(take_rows(batch.prompts, 0, size)),
                group=group,
                limit=self.rollout.limit,
                key=jax.random.fold_in(jax.random.key(seed), 2**31 - 1),
                prompt_index=self.layout.put_batch(batch.index),
                sampling=sampling,
            )
            for item, tokens, lengths in zip(part, rollout.tokens, rollout.length, strict=False):
                for ids, length in zip(tokens, lengths, strict=True):
                    text = self.processor.decode(ids[:length])
                    rewards.append(score(text, item.example.answer, self.grpo.accuracy_weight))
        return rewards


def heldout_items(datasets: dict[str, grain.MapDataset], count: int) -> dict[str, list[Item]]:
    """The first `count` items of each task's held-out stream."""
    return {task: [items[i] for i in range(count)] for task, items in datasets.items()}

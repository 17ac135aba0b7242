"""Held-out scores of the pretext tasks: greedy and sampled accuracy, format and reward."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from spatial_ssrl_jax.config.schema import EvalSettings, RewardSettings, RolloutSettings
from spatial_ssrl_jax.data.items import Item
from spatial_ssrl_jax.data.pipeline import Collate
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.parallel.collectives import all_gather
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.model import Params
from spatial_ssrl_jax.rl.batch import take_rows
from spatial_ssrl_jax.rl.rewards import score_response
from spatial_ssrl_jax.rollout.decode import DecodeWeights
from spatial_ssrl_jax.rollout.engine import Engine
from spatial_ssrl_jax.rollout.sampling import GREEDY, Sampling

HeldoutTable = dict[str, dict[str, float]]


@dataclass(frozen=True)
class HeldoutEval:
    """Fixed held-out examples of every task, and what it takes to answer and score them.

    Attributes:
      items: held-out items by task.
      engine, processor, layout: sample responses and decode them.
      collate: pads prompts.
      settings: the config's `eval` section.
      rollout: the config's `rollout` section.
      reward: the config's `reward` section.
      temperature: the training temperature.
    """

    items: dict[str, list[Item]]
    engine: Engine
    processor: Processor
    layout: Layout
    collate: Collate
    settings: EvalSettings
    rollout: RolloutSettings
    reward: RewardSettings
    temperature: float

    def measure(self, params: Params, trained: Sequence[str], seed: int) -> HeldoutTable:
        """Scores every held-out example, greedily and sampled at the training temperature.

        Returns:
          `{task: {"accuracy_greedy", "accuracy_sampled", "format", "reward", "count"}, "mean":
          {…}}`; format and reward are of the sampled responses, `mean` is over trained tasks.
        """
        weights = self.engine.fill(params)
        table: HeldoutTable = {}
        for task, items in self.items.items():
            greedy = self._rewards(params, weights, items, 1, GREEDY, seed)
            drawn = Sampling(self.temperature)
            sampled = self._rewards(params, weights, items, self.settings.samples, drawn, seed)
            overall, accuracy, formatted = sampled.mean(axis=(0, 1))
            table[task] = {
                "accuracy_greedy": float(greedy[..., 1].mean()),
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

    def _rewards(
        self,
        params: Params,
        weights: DecodeWeights,
        items: list[Item],
        group_size: int,
        sampling: Sampling,
        seed: int,
    ) -> np.ndarray:
        """[items, group_size, 3] float64 rewards of the responses: overall, accuracy, format."""
        size = self.settings.batch_prompts
        rows = size // jax.process_count()
        first = rows * jax.process_index()
        rewards = []
        for start in range(0, len(items), size):
            chunk = items[start : start + size]
            padded = chunk + [chunk[-1]] * (size - len(chunk))
            batch = self.collate(list(enumerate(padded, start)))
            own = padded[first : first + rows]
            rollout = self.engine.generate(
                params,
                weights,
                self.layout.put_batch(take_rows(batch.prompts, first, rows)),
                group_size=group_size,
                max_new_tokens=self.rollout.max_new_tokens,
                key=jax.random.fold_in(jax.random.key(seed), 2**31 - 1),
                prompt_index=self.layout.put_batch(batch.index[first : first + rows]),
                sampling=sampling,
            )
            scored = [
                [self._score(item, ids[:n]) for ids, n in zip(tokens, lengths, strict=True)]
                for item, tokens, lengths in zip(own, rollout.tokens, rollout.length, strict=True)
            ]
            rewards.append(all_gather(np.array(scored))[: len(chunk)])
        return np.concatenate(rewards)

    def _score(self, item: Item, ids: np.ndarray) -> tuple[float, float, float]:
        text = self.processor.decode(ids)
        reward = score_response(text, len(ids), item.example, self.reward)
        return reward.overall, reward.accuracy, reward.format

"""Held-out scores of the pretext tasks: greedy and sampled accuracy, format and reward."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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
from spatial_ssrl_jax.tasks.example import Example

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
      chances: by the name of a task that knows it, see `Task.chance`.
      temperature: the training temperature.
    """

    items: dict[str, list[Item]]
    buckets: Buckets
    settings: EvalSettings
    rollout: RolloutSettings
    scorer: Scorer
    chances: Mapping[str, Callable[[Example], float]]
    temperature: float

    def measure(
        self, policy: Policy, trained: Sequence[str], seed: int, grey: bool = False
    ) -> HeldoutTable:
        """Scores every held-out example, greedily and sampled at the training temperature.

        Args:
          policy: answers.
          trained: the tasks over which the mean is taken.
          seed: of the samples.
          grey: also measures what the questions' text alone gives, with grey images.

        Returns:
          `{task: {"accuracy_greedy", "accuracy_sampled", "format", "reward", "chance",
          "accuracy_grey", "count"}, "mean": likewise}`, and likewise `task/kind` for each kind of
          tasks that have several. Format, reward and grey accuracy are of the samples; `chance` is
          left out where a task has none.
        """
        items = [item for group in self.items.values() for item in group]
        rewards = self._rewards(policy, items, seed)
        greyed = self._rewards(policy, [*map(_greyed, items)], seed) if grey else None
        tasks = np.repeat([*self.items], [len(group) for group in self.items.values()])
        kinds = np.array([f"{t}/{i.example.kind}" for t, i in zip(tasks, items, strict=True)])
        table: HeldoutTable = {}
        for task in self.items:
            found = np.unique(kinds[tasks == task]).tolist()
            names = [(task, tasks), *((kind, kinds) for kind in found if len(found) > 1)]
            for name, names_of_items in names:
                mine = np.flatnonzero(names_of_items == name)
                table[name] = _metrics(rewards[mine], None if greyed is None else greyed[mine])
                if chance := self.chances.get(task):
                    table[name]["chance"] = float(np.mean([chance(items[i].example) for i in mine]))
        rows = [table[t] for t in trained if t in table]
        if rows:
            keys = [k for k in rows[0] if all(k in row for row in rows)]
            table["mean"] = {k: float(np.mean([r[k] for r in rows])) for k in keys}
            table["mean"]["count"] = sum(r["count"] for r in rows)
        return table

    def _rewards(self, policy: Policy, items: Sequence[Item], seed: int) -> np.ndarray:
        """[items, samples + 1, 3] float64 rewards: overall, accuracy, format.

        Prompts of all tasks are bucketed together and prefilled once; the last response is greedy.
        """
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


def _metrics(rewards: np.ndarray, greyed: np.ndarray | None) -> dict[str, float]:
    """Means over [items, samples + 1, 3] rewards."""
    overall, accuracy, formatted = rewards[:, :-1].mean(axis=(0, 1)).tolist()
    found = {
        "accuracy_greedy": float(rewards[:, -1, 1].mean()),
        "accuracy_sampled": accuracy,
        "format": formatted,
        "reward": overall,
        "count": len(rewards),
    }
    if greyed is not None:
        found["accuracy_grey"] = float(greyed[:, :-1, 1].mean())
    return found


def _greyed(item: Item) -> Item:
    """The item with every pixel of its images at the middle of its range."""
    grey = np.full_like(item.prompt.patches, 128)
    return replace(item, prompt=replace(item.prompt, patches=grey))


def _group(processor: Processor, item: Item, rollout: Rollout, row: int) -> SampledGroup:
    """The responses of one row of a rollout."""
    lengths = rollout.length[row].tolist()
    texts = [
        processor.decode(ids[:length])
        for ids, length in zip(rollout.tokens[row], lengths, strict=True)
    ]
    return SampledGroup(item.example, texts, lengths)

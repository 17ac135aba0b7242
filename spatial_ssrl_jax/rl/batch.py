"""What an update trains on."""

from dataclasses import dataclass
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spatial_ssrl_jax.qwen_vl.inputs import Leaf, PackedRows, PromptBatch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ResponseBatch(Generic[Leaf]):
    """Prompts with the responses to learn from.

    Attributes:
      prompts: B prompts.
      tokens: [B, G, R] int32 response tokens.
      length: [B, G] int32 tokens of each response, the end token included.
      weight: [B, G] float32 weight of each token of a sample in the optimizer step's loss.
      normaliser: [] float32, response tokens of the whole optimizer step, for its metrics.
    """

    prompts: PromptBatch[Leaf]
    tokens: Leaf
    length: Leaf
    weight: Leaf
    normaliser: Leaf

    @property
    def mask(self: "ResponseBatch[Array]") -> Array:
        """[B, G, R] float32, 1 where a response token is."""
        return (jnp.arange(self.tokens.shape[2]) < self.length[..., None]).astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GroupBatch(ResponseBatch[Leaf]):
    """Sampled groups with what the policy gradient needs.

    Attributes:
      advantage: [B, G] float32.
      sampled_logprobs: [B, G, R] float32, from the sampler.
      old_logprobs: [B, G, R] float32, the trainer's before the first update of this rollout; None
        where they are the current ones.
      reference_logprobs: [B, G, R] float32, or None without KL.
      kl_coef: [] float32, β of this step, or None where it is the config's in all.
      first_update: [] bool, whether this is the first update of the rollout: then the current
        log-probabilities are the old ones, and `old_logprobs` holds anything. So all updates run
        one program. None where `old_logprobs` are right as they are.
    """

    advantage: Leaf
    sampled_logprobs: Leaf
    old_logprobs: Leaf | None
    reference_logprobs: Leaf | None
    kl_coef: Leaf | None = None
    first_update: Leaf | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedBatch(Generic[Leaf]):
    """Examples of supervised training, several in a row.

    Attributes:
      rows: B rows.
      normaliser: [] float32, response tokens of the whole optimizer step.
    """

    rows: PackedRows[Leaf]
    normaliser: Leaf

    @property
    def weight(self: "PackedBatch[Array]") -> Array:
        """[B, R] float32 weight of each response token in the optimizer step's loss."""
        return (self.rows.place >= 0) / self.normaliser


Tree = TypeVar("Tree")


def take_rows(batch: Tree, start: int, rows: int) -> Tree:
    """Rows `start` to `start + rows` of every array of a batch; scalars stay."""
    return jax.tree.map(lambda x: x[start : start + rows] if np.ndim(x) else x, batch)

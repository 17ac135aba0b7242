"""What an update trains on."""

from dataclasses import dataclass
from typing import Generic

import jax

from spatial_ssrl_jax.qwen_vl.inputs import Leaf, PackedRows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedBatch(Generic[Leaf]):
    """Prompts with the responses to learn from.

    Attributes:
      rows: B packed rows.
      weight: [B, R] float32 weight of each token in the optimizer step's loss; 0 for padding.
      normaliser: [] float32, response tokens that the whole optimizer step computes, for its
        metrics.
    """

    rows: PackedRows[Leaf]
    weight: Leaf
    normaliser: Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GroupBatch(PackedBatch[Leaf]):
    """Sampled groups with what the policy gradient needs.

    Attributes:
      advantage: [B, R] float32, of each token's sample.
      sampled_logprobs: [B, R] float32, from the sampler.
      old_logprobs: [B, R] float32, the trainer's before the first update of this rollout; None
        where they are the current ones.
      reference_logprobs: [B, R] float32, or None without KL.
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

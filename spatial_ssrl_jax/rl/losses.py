"""The losses: supervised, and GRPO's clipped policy loss with its KL.

A loss is a sum over tokens that are already weighted within the optimizer step (`sample_weights`),
so that micro-batches add up, and so do the parts of the step's metrics that come with it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import (
    Aggregation,
    GrpoSettings,
    ImportanceCorrection,
    KlEstimator,
)
from spatial_ssrl_jax.parallel.collectives import all_sum
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.model import Params
from spatial_ssrl_jax.rl.batch import GroupBatch, PackedBatch
from spatial_ssrl_jax.rl.logprobs import packed_logprobs, response_logprobs

Sums = dict[str, Array]


@dataclass(frozen=True)
class SftLoss:
    """Mean negative log-likelihood of the response tokens, end token included."""

    config: QwenVLConfig
    compute: Compute

    def __call__(self, params: Params, batch: PackedBatch[Array]) -> tuple[Array, Sums]:
        logprob, entropy = packed_logprobs(self.config, self.compute, params, batch.rows)
        loss = -jnp.sum(logprob * batch.weight)
        return loss, {
            "loss/total": loss,
            "loss/sft": loss,
            "policy/entropy": jnp.sum(entropy * batch.weight),
        }


@dataclass(frozen=True)
class GrpoLoss:
    """`grpo_loss` of a model.

    Attributes:
      config: the model's shape.
      compute: how to compute.
      settings: the config's `grpo` section.
    """

    config: QwenVLConfig
    compute: Compute
    settings: GrpoSettings

    def __call__(self, params: Params, batch: GroupBatch[Array]) -> tuple[Array, Sums]:
        if self.settings.kl_coef and batch.reference_logprobs is None:
            raise UserError(
                f"grpo.kl_coef={self.settings.kl_coef} needs the reference's log-probabilities and "
                "the batch has none: give a reference model, or set grpo.kl_coef=0."
            )
        logprob, entropy = response_logprobs(
            self.config,
            self.compute,
            params,
            batch.prompts,
            batch.tokens,
            batch.length,
            self.settings.temperature,
        )
        return grpo_loss(self.settings, batch, logprob, entropy)


def grpo_loss(
    settings: GrpoSettings, batch: GroupBatch[Array], logprob: Array, entropy: Array
) -> tuple[Array, Sums]:
    """GRPO's loss (arXiv 2402.03300) of the current log-probabilities log π.

    With the advantage A and the ratio r = π / π_old of a token:

        policy = max(-A·r, -A·clip(r, 1 - ε_low, 1 + ε_high))   PPO 1707.06347, DAPO 2503.14476
        policy = min(policy, -c·A)  where A < 0                 dual clip, 1912.09729
        policy = ρ·policy                                       ρ = π_trainer / π_sampler, bounded
        loss   = Σ_tokens w·m·policy + β·Σ_tokens w·m·KL(π, π_ref)

    w is the sample's weight per token (`sample_weights`), m is 1 inside of responses. ln r and ln ρ
    are clipped to ±20, so that no exponential overflows.

    Args:
      settings: the config's `grpo` section.
      batch: groups with advantages and earlier log-probabilities.
      logprob: [B, G, R] float32, of the response tokens under the current weights.
      entropy: [B, G, R] float32, in nats; only a metric.

    Returns:
      [] float32 loss, and this batch's part of the step's metrics.
    """
    mask = batch.mask
    weight = mask * batch.weight[..., None]
    advantage = batch.advantage[..., None]
    trainer = jax.lax.stop_gradient(logprob) if batch.old_logprobs is None else batch.old_logprobs
    old = batch.sampled_logprobs if settings.old_logprobs == "sampler" else trainer
    gap = trainer - batch.sampled_logprobs

    ratio = jnp.exp(jnp.clip(logprob - old, -20.0, 20.0))
    unclipped = -advantage * ratio
    clipped = -advantage * jnp.clip(ratio, 1.0 - settings.clip_low, 1.0 + settings.clip_high)
    policy = jnp.maximum(unclipped, clipped)
    is_clipped = clipped > unclipped
    metrics = {
        "policy/ratio_mean": ratio,
        "policy/clip_high": (is_clipped & (ratio > 1.0)).astype(jnp.float32),
        "policy/clip_low": (is_clipped & (ratio < 1.0)).astype(jnp.float32),
    }
    if settings.dual_clip:
        bound = -advantage * settings.dual_clip
        is_bound = (advantage < 0) & (policy > bound)
        policy = jnp.where(is_bound, bound, policy)
        metrics["policy/clip_dual"] = is_bound.astype(jnp.float32)
    if settings.importance_correction != "none":
        correction = importance_weight(settings.importance_correction, gap, settings.importance_max)
        policy = policy * correction
        metrics["mismatch/correction_mean"] = correction

    policy_loss = jnp.sum(policy * weight)
    loss, losses = policy_loss, {"loss/policy": policy_loss}
    if batch.reference_logprobs is not None:
        kl = KL_ESTIMATORS[settings.kl_estimator](logprob, batch.reference_logprobs)
        kl_loss = settings.kl_coef * jnp.sum(kl * weight)
        loss = policy_loss + kl_loss
        losses["loss/kl"] = kl_loss
        metrics["kl/mean"] = kl

    metrics |= {"policy/entropy": entropy, "mismatch/logprob_mean": jnp.abs(gap)}
    means = {name: jnp.sum(x * mask) / batch.normaliser for name, x in metrics.items()}
    largest = {"mismatch/logprob_max": jnp.max(jnp.abs(gap) * mask)}
    return loss, losses | means | largest | {"loss/total": loss}


def importance_weight(kind: ImportanceCorrection, gap: Array, bound: float) -> Array:
    """ρ = π_trainer / π_sampler of each token, truncated at a bound or 0 where masked.

    Args:
      kind: `truncate` (truncated importance sampling, Ionides 2008), or `mask` (0 outside
        [1/bound, bound]).
      gap: float32 log π_trainer - log π_sampler.
      bound: at least 1.
    """
    ratio = jnp.exp(jnp.clip(gap, -20.0, 20.0))
    if kind == "truncate":
        return jnp.minimum(ratio, bound)
    return jnp.where((ratio >= 1.0 / bound) & (ratio <= bound), ratio, 0.0)


# The estimators k1, k2 and k3 of KL(π, π_ref) are those of Schulman, "Approximating KL Divergence"
# (joschu.net/blog/kl-approx.html, 2020). The clips keep exponentials and gradients finite.


def k1_kl(logprob: Array, reference: Array) -> Array:
    """logprob - reference, clipped to ±20: unbiased, and of either sign."""
    return jnp.clip(logprob - reference, -20.0, 20.0)


def k2_kl(logprob: Array, reference: Array) -> Array:
    """d²/2 with d = clip(reference - logprob, ±20); its gradient is the KL's on average."""
    return 0.5 * jnp.square(jnp.clip(reference - logprob, -20.0, 20.0))


def k3_kl(logprob: Array, reference: Array) -> Array:
    """e^d - d - 1 with d = clip(reference - logprob, ±20), clipped to ±10; at least zero."""
    d = jnp.clip(reference - logprob, -20.0, 20.0)
    return jnp.clip(jnp.exp(d) - d - 1.0, -10.0, 10.0)


KL_ESTIMATORS: dict[KlEstimator, Callable[[Array, Array], Array]] = {
    "k1": k1_kl,
    "k2": k2_kl,
    "k3": k3_kl,
}


def sample_weights(
    length_BG: np.ndarray, counted_BG: np.ndarray, aggregation: Aggregation, max_new_tokens: int
) -> np.ndarray:
    """The weight of each token of each sample, so that the step's loss is their weighted sum.

    - `token`: the mean over all tokens of the optimizer step, as in the paper and in DAPO;
    - `sequence`: the mean over samples of the mean over each sample's tokens, as in GRPO;
    - `dr_grpo`: the sum over tokens divided by samples x `max_new_tokens`, so that a long response
      is not diluted (Dr. GRPO, arXiv 2503.20783, which does not divide by the deviation either).

    Args:
      length_BG: int32 tokens of each response, this process's rows of the optimizer step.
      counted_BG: bool; samples that are left out weigh nothing and are not averaged over.
      aggregation: how to average.
      max_new_tokens: tokens of a response at most.

    Returns:
      [B, G] float32.
    """
    tokens = all_sum(float(length_BG[counted_BG].sum()))
    samples = all_sum(float(counted_BG.sum()))
    if aggregation == "token":
        weight = np.full(length_BG.shape, 1.0 / max(tokens, 1.0))
    elif aggregation == "sequence":
        weight = 1.0 / (max(samples, 1.0) * np.maximum(length_BG, 1))
    else:
        weight = np.full(length_BG.shape, 1.0 / (max(samples, 1.0) * max_new_tokens))
    return np.where(counted_BG, weight, 0.0).astype(np.float32)

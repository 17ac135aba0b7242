"""The losses: supervised, and GRPO's clipped policy loss with its KL.

A loss is a sum over tokens that are already weighted within the optimizer step (`sample_weights`),
so that micro-batches add up, and so do the parts of the step's metrics that come with it.
"""

import math
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
from spatial_ssrl_jax.rl.logprobs import packed_logprobs

Sums = dict[str, Array]


@dataclass(frozen=True)
class SftLoss:
    """Mean negative log-likelihood of the response tokens, end token included."""

    config: QwenVLConfig
    compute: Compute

    def __call__(self, params: Params, batch: PackedBatch[Array]) -> tuple[Array, Sums]:
        logprob, entropy = packed_logprobs(self.config, self.compute, params, batch.rows, 1.0)
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
        logprob, entropy = packed_logprobs(
            self.config, self.compute, params, batch.rows, self.settings.temperature
        )
        return grpo_loss(self.settings, batch, logprob, entropy)


def grpo_loss(
    settings: GrpoSettings, batch: GroupBatch[Array], logprob: Array, entropy: Array
) -> tuple[Array, Sums]:
    """GRPO's loss (arXiv 2402.03300) of the current log-probabilities log π.

    With the advantage A and the ratio r = π / π_old of a token:

        ln r   = mean of ln r over the sample's tokens          GSPO alone, 2507.18071
        policy = max(-A·r, -A·clip(r, 1 - ε_low, 1 + ε_high))   PPO 1707.06347, DAPO 2503.14476
        policy = min(policy, -c·A)  where A < 0                 dual clip, 1912.09729
        policy = -A·sg(clip(r, 1 - ε_low, 1 + ε_high))·log π    CISPO, 2506.13585, for these two
        policy = ρ·policy                                       ρ = π_trainer / π_sampler, bounded
        loss   = Σ_tokens w·m·policy + β·Σ_tokens w·m·KL(π, π_ref)

    w is the sample's weight per token (`sample_weights`), m is 1 inside of responses. ρ is a
    token's, or the product over the sample's tokens. ln r and ln ρ are clipped to ±20, so that no
    exponential overflows. sg stops gradients.

    Args:
      settings: the config's `grpo` section.
      batch: groups with advantages and earlier log-probabilities.
      logprob: [B, R] float32, of the response tokens under the current weights.
      entropy: [B, R] float32, in nats; only a metric.

    Returns:
      [] float32 loss, and this batch's part of the step's metrics.
    """
    mask, weight, sample = batch.rows.mask, batch.weight, batch.rows.sample
    trainer = old_logprobs(batch, jax.lax.stop_gradient(logprob))
    old = batch.sampled_logprobs if settings.old_logprobs == "sampler" else trainer
    gap = trainer - batch.sampled_logprobs

    log_ratio = logprob - old
    if settings.policy_loss == "gspo":
        log_ratio = sequence_log_ratio(log_ratio, mask, sample)
    ratio = jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))
    policy, metrics = policy_terms(settings, batch.advantage, logprob, ratio)
    if settings.importance_correction != "none":
        by_token = settings.importance_level == "token"
        correction, is_bounded = importance_weight(
            settings.importance_correction,
            gap if by_token else sample_sums(gap * mask, sample),
            settings.importance_max,
        )
        policy = policy * correction
        metrics["mismatch/correction_mean"] = correction
        metrics["mismatch/correction_clipped"] = is_bounded

    policy_loss = jnp.sum(policy * weight)
    loss, losses = policy_loss, {"loss/policy": policy_loss}
    if batch.reference_logprobs is not None:
        kl = KL_ESTIMATORS[settings.kl_estimator](logprob, batch.reference_logprobs)
        kl_coef = settings.kl_coef if batch.kl_coef is None else batch.kl_coef
        kl_loss = kl_coef * jnp.sum(kl * weight)
        loss = policy_loss + kl_loss
        losses["loss/kl"] = kl_loss
        metrics["kl/mean"] = kl

    metrics |= {"policy/entropy": entropy, "mismatch/logprob_mean": jnp.abs(gap)}
    means = {name: jnp.sum(x * mask) / batch.normaliser for name, x in metrics.items()}
    largest = {"mismatch/logprob_max": jnp.max(jnp.abs(gap) * mask)}
    return loss, losses | means | largest | {"loss/total": loss}


def old_logprobs(batch: GroupBatch[Array], current: Array) -> Array:
    """[B, R] the trainer's log-probabilities before the first update of the rollout."""
    if batch.old_logprobs is None:
        return current
    if batch.first_update is None:
        return batch.old_logprobs
    return jnp.where(batch.first_update, current, batch.old_logprobs)


def policy_terms(
    settings: GrpoSettings, advantage: Array, logprob: Array, ratio: Array
) -> tuple[Array, Sums]:
    """The policy loss of each token before any correction, and where it is clipped.

    Args:
      settings: the config's `grpo` section.
      advantage: [B, R] float32.
      logprob: [B, R] float32.
      ratio: [B, R] float32 r.

    Returns:
      [B, R] float32, and metrics of that shape.
    """
    unclipped = -advantage * ratio
    bounded = jnp.clip(ratio, 1.0 - settings.clip_low, 1.0 + settings.clip_high)
    clipped = -advantage * bounded
    is_cispo = settings.policy_loss == "cispo"
    if is_cispo:
        policy, is_clipped = jax.lax.stop_gradient(clipped) * logprob, bounded != ratio
    else:
        policy, is_clipped = jnp.maximum(unclipped, clipped), clipped > unclipped
    metrics = {
        "policy/ratio_mean": ratio,
        "policy/clip_high": (is_clipped & (ratio > 1.0)).astype(jnp.float32),
        "policy/clip_low": (is_clipped & (ratio < 1.0)).astype(jnp.float32),
    }
    if settings.dual_clip and not is_cispo:
        bound = -advantage * settings.dual_clip
        is_bound = (advantage < 0) & (policy > bound)
        policy = jnp.where(is_bound, bound, policy)
        metrics["policy/clip_dual"] = is_bound.astype(jnp.float32)
    return policy, metrics


def sequence_log_ratio(log_ratio: Array, mask: Array, sample: Array) -> Array:
    """[B, R] the mean of each sample's log-ratios (GSPO, arXiv 2507.18071), at all its tokens.

    Each has the gradient of its own token, as in the paper's GSPO-token: their sum is that of the
    mean at all tokens, and a weight of single tokens, such as ρ, weighs their gradients alone.
    """
    constant = jax.lax.stop_gradient(log_ratio)
    tokens = jnp.maximum(sample_sums(mask, sample), 1.0)
    mean = sample_sums(constant * mask, sample) / tokens
    return mean + (log_ratio - constant)


def sample_sums(x: Array, sample: Array) -> Array:
    """[B, R] the sum of `x` [B, R] over each token's sample, at all its tokens.

    Args:
      x: float32, 0 for padding.
      sample: [B, R] int32, which sample of the row; -1 is padding.
    """

    def row(x: Array, sample: Array) -> Array:
        # A row has no more samples than tokens.
        sums = jax.ops.segment_sum(x, sample, num_segments=x.shape[0])
        return sums[sample]

    return jax.vmap(row)(x, jnp.maximum(sample, 0))


def importance_weight(kind: ImportanceCorrection, gap: Array, bound: float) -> tuple[Array, Array]:
    """ρ = π_trainer / π_sampler, truncated at a bound or 0 where masked, and where that happens.

    Args:
      kind: `truncate` (truncated importance sampling, Ionides 2008), or `mask` (0 outside
        [1/bound, bound]).
      gap: float32 log π_trainer - log π_sampler, of tokens or summed over a sample's.
      bound: at least 1.

    Returns:
      Two float32 arrays of `gap`'s shape; the second has 1 and 0.
    """
    ratio = jnp.exp(jnp.clip(gap, -20.0, 20.0))
    if kind == "truncate":
        weight = jnp.minimum(ratio, bound)
    else:
        weight = jnp.where((ratio >= 1.0 / bound) & (ratio <= bound), ratio, 0.0)
    return weight, (weight != ratio).astype(jnp.float32)


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


def scheduled_kl_coef(settings: GrpoSettings, step: int) -> np.float32 | None:
    """β at a step of the stage, from 0, where it decays to zero; None where it is constant."""
    progress = step / settings.steps
    if settings.kl_schedule == "linear":
        return np.float32(settings.kl_coef * (1.0 - progress))
    if settings.kl_schedule == "cosine":
        return np.float32(settings.kl_coef * 0.5 * (1.0 + math.cos(math.pi * progress)))
    return None


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

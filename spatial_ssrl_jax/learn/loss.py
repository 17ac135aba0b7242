"""The losses: supervised, and GRPO's clipped policy loss with its KL.

Both return a loss that is already divided by the optimizer step's tokens, so that micro-batches
add up, and sums from which the step's metrics are made.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from spatial_ssrl_jax.learn.batch import GroupBatch, ResponseBatch
from spatial_ssrl_jax.learn.logprobs import response_logprobs
from spatial_ssrl_jax.qwen2_5_vl.config import Qwen2_5_VLConfig
from spatial_ssrl_jax.qwen2_5_vl.model import Compute, Params

Sums = dict[str, Array]


@dataclass(frozen=True)
class SftLoss:
    """Mean negative log-likelihood of the response tokens, end token included."""

    config: Qwen2_5_VLConfig
    compute: Compute

    def __call__(self, params: Params, batch: ResponseBatch) -> tuple[Array, Sums]:
        logprob, entropy = response_logprobs(
            self.config, self.compute, params, batch.prompts, batch.tokens, batch.length, 1.0
        )
        mask = batch.mask
        loss = -jnp.sum(logprob * mask) / batch.normaliser
        return loss, {
            "loss/total": loss,
            "loss/sft": loss,
            "policy/entropy": jnp.sum(entropy * mask) / batch.normaliser,
        }


@dataclass(frozen=True)
class GrpoLoss:
    """The clipped policy loss plus `kl_coefficient` times the k3 KL, as the paper trains.

    Attributes:
      config: the model's shape.
      compute: dtype, chunks and rematerialisation.
      temperature: divides the logits.
      clip_low, clip_high: bounds of the ratio below and above 1.
      dual_clip: bound of the loss for negative advantages, times -A; 0 turns it off.
      kl_coefficient: weight of the KL.
    """

    config: Qwen2_5_VLConfig
    compute: Compute
    temperature: float
    clip_low: float
    clip_high: float
    dual_clip: float
    kl_coefficient: float

    def __call__(self, params: Params, batch: GroupBatch) -> tuple[Array, Sums]:
        logprob, entropy = response_logprobs(
            self.config,
            self.compute,
            params,
            batch.prompts,
            batch.tokens,
            batch.length,
            self.temperature,
        )
        mask = batch.mask
        current = jax.lax.stop_gradient(logprob)
        old = current if batch.old_logprobs is None else batch.old_logprobs

        def mean(x: Array) -> Array:
            return jnp.sum(x * mask) / batch.normaliser

        policy, stats = self.policy_terms(logprob, old, batch.advantage[..., None])
        loss = policy_loss = mean(policy)
        sums = {name: mean(value) for name, value in stats.items()}
        if batch.reference_logprobs is not None:
            kl = mean(k3_kl(logprob, batch.reference_logprobs))
            loss = loss + self.kl_coefficient * kl
            sums |= {"kl/mean": kl, "loss/kl": self.kl_coefficient * kl}
        gap = jnp.abs(old - batch.sampled_logprobs) * mask
        return loss, sums | {
            "loss/total": loss,
            "loss/policy": policy_loss,
            "policy/entropy": mean(entropy),
            "mismatch/logprob_mean": jnp.sum(gap) / batch.normaliser,
            "mismatch/logprob_max": jnp.max(gap),
        }

    def policy_terms(self, logprob: Array, old: Array, advantage: Array) -> tuple[Array, Sums]:
        """Each token's clipped loss, and where which clip was active."""
        ratio = jnp.exp(jnp.clip(logprob - old, -20.0, 20.0))
        plain = -advantage * ratio
        bounded = -advantage * jnp.clip(ratio, 1.0 - self.clip_low, 1.0 + self.clip_high)
        loss = jnp.maximum(plain, bounded)
        clipped = bounded > plain
        stats = {
            "policy/ratio_mean": ratio,
            "policy/clip_high": (clipped & (ratio > 1.0)).astype(jnp.float32),
            "policy/clip_low": (clipped & (ratio < 1.0)).astype(jnp.float32),
        }
        if self.dual_clip:
            most = -advantage * self.dual_clip
            active = (advantage < 0) & (loss > most)
            loss = jnp.where(active, most, loss)
            stats["policy/clip_dual"] = active.astype(jnp.float32)
        return loss, stats


def k3_kl(logprob: Array, reference: Array) -> Array:
    """e^d - d - 1 with d = clip(reference - logprob, ±20), clipped to ±10; at least zero."""
    d = jnp.clip(reference - logprob, -20.0, 20.0)
    return jnp.clip(jnp.exp(d) - d - 1.0, -10.0, 10.0)

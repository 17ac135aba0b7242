"""The losses: supervised, and GRPO's clipped policy loss with its KL.

Both return a loss whose tokens are already weighted within the optimizer step, so that
micro-batches add up, and shares of the step's metrics, which add up as well.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import GrpoSettings
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

    def __call__(self, params: Params, batch: PackedBatch) -> tuple[Array, Sums]:
        logprob, entropy = packed_logprobs(self.config, self.compute, params, batch.rows)
        loss = -jnp.sum(logprob * batch.weight)
        return loss, {
            "loss/total": loss,
            "loss/sft": loss,
            "policy/entropy": jnp.sum(entropy * batch.weight),
        }


@dataclass(frozen=True)
class GrpoLoss:
    """The clipped policy loss plus `kl_coef` times the KL to the reference.

    Attributes:
      config: the model's shape.
      compute: dtype, chunks and rematerialisation.
      settings: the config's `grpo` section.
    """

    config: QwenVLConfig
    compute: Compute
    settings: GrpoSettings

    def __call__(self, params: Params, batch: GroupBatch) -> tuple[Array, Sums]:
        settings = self.settings
        if settings.kl_coef and batch.reference_logprobs is None:
            raise UserError(
                f"grpo.kl_coef={settings.kl_coef} needs the reference's "
                "log-probabilities and the batch has none: give a reference model, or set "
                "grpo.kl_coef=0."
            )
        logprob, entropy = response_logprobs(
            self.config,
            self.compute,
            params,
            batch.prompts,
            batch.tokens,
            batch.length,
            settings.temperature,
        )
        mask = batch.mask
        share = mask * batch.weight[..., None]
        current = jax.lax.stop_gradient(logprob)
        trainer = current if batch.old_logprobs is None else batch.old_logprobs
        old = batch.sampled_logprobs if settings.old_logprobs == "sampler" else trainer

        def mean(x: Array) -> Array:
            return jnp.sum(x * mask) / batch.normaliser

        policy, stats = self.policy_terms(logprob, old, batch.advantage[..., None])
        if settings.importance_correction != "none":
            correction = self.correction(trainer - batch.sampled_logprobs)
            policy = policy * correction
            stats["mismatch/correction_mean"] = correction
        loss = policy_loss = jnp.sum(policy * share)
        sums = {name: mean(value) for name, value in stats.items()}
        if batch.reference_logprobs is not None:
            kl = KL_ESTIMATORS[settings.kl_estimator](logprob, batch.reference_logprobs)
            kl_loss = settings.kl_coef * jnp.sum(kl * share)
            loss = loss + kl_loss
            sums |= {"kl/mean": mean(kl), "loss/kl": kl_loss}
        gap = jnp.abs(trainer - batch.sampled_logprobs) * mask
        return loss, sums | {
            "loss/total": loss,
            "loss/policy": policy_loss,
            "policy/entropy": mean(entropy),
            "mismatch/logprob_mean": jnp.sum(gap) / batch.normaliser,
            "mismatch/logprob_max": jnp.max(gap),
        }

    def policy_terms(self, logprob: Array, old: Array, advantage: Array) -> tuple[Array, Sums]:
        """Each token's clipped loss, and where which clip was active."""
        settings = self.settings
        ratio = jnp.exp(jnp.clip(logprob - old, -20.0, 20.0))
        plain = -advantage * ratio
        low, high = 1.0 - settings.clip_low, 1.0 + settings.clip_high
        bounded = -advantage * jnp.clip(ratio, low, high)
        loss = jnp.maximum(plain, bounded)
        clipped = bounded > plain
        stats = {
            "policy/ratio_mean": ratio,
            "policy/clip_high": (clipped & (ratio > 1.0)).astype(jnp.float32),
            "policy/clip_low": (clipped & (ratio < 1.0)).astype(jnp.float32),
        }
        if settings.dual_clip:
            most = -advantage * settings.dual_clip
            active = (advantage < 0) & (loss > most)
            loss = jnp.where(active, most, loss)
            stats["policy/clip_dual"] = active.astype(jnp.float32)
        return loss, stats

    def correction(self, gap: Array) -> Array:
        """Each token's weight from log p_trainer - log p_sampler: truncated, or 0 where masked."""
        limit = self.settings.importance_max
        ratio = jnp.exp(jnp.clip(gap, -20.0, 20.0))
        if self.settings.importance_correction == "truncate":
            return jnp.minimum(ratio, limit)
        return jnp.where((ratio >= 1.0 / limit) & (ratio <= limit), ratio, 0.0)


def k1_kl(logprob: Array, reference: Array) -> Array:
    """logprob - reference, clipped to ±20: right on average, and of either sign."""
    return jnp.clip(logprob - reference, -20.0, 20.0)


def k2_kl(logprob: Array, reference: Array) -> Array:
    """d²/2 with d = clip(reference - logprob, ±20); its gradient is the KL's on average."""
    return 0.5 * jnp.square(jnp.clip(reference - logprob, -20.0, 20.0))


def k3_kl(logprob: Array, reference: Array) -> Array:
    """e^d - d - 1 with d = clip(reference - logprob, ±20), clipped to ±10; at least zero."""
    d = jnp.clip(reference - logprob, -20.0, 20.0)
    return jnp.clip(jnp.exp(d) - d - 1.0, -10.0, 10.0)


KL_ESTIMATORS = {"k1": k1_kl, "k2": k2_kl, "k3": k3_kl}

"""The fraction of a GRPO update that would be padding under a config, at the tasks' own lengths."""

from typing import Any

import numpy as np

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.data.batching import smallest_bucket
from spatial_ssrl_jax.data.lengths import Lengths
from spatial_ssrl_jax.rl.bucketing import BatchShape, BatchSlice, Buckets, bucket_by_length


def measure_padding(
    config: Config, lengths: Lengths, steps: int, mean: float, spread: float
) -> dict[str, Any]:
    """Buckets the updates of many steps as training does, but computes nothing.

    Responses are once as long as those of synthetic SFT data, and once drawn from a log-normal
    distribution, each sample independently.

    Args:
      config: buckets, micro-batches, group and updates.
      lengths: of the tasks.
      steps: GRPO steps.
      mean: mean tokens of a drawn response.
      spread: sigma of its logarithm.

    Returns:
      `source`, what was measured; mean and quantiles of `prompt_tokens` and `prompt_windows`; and
      by kind of response, `synthetic` and `drawn`: `padding_share`, the fraction of padded tokens;
      `in_order_share`, the same for micro-batches in order, padded to one shape an update,
      responses to multiples of `rollout.kv_block`; `min_share`, the same for a micro-batch and a
      bucket of its own for each prompt; `window_padding_share`, the fraction of padded vision
      windows; and `programs`, the number of shapes.

    Raises:
      UserError: an argument is out of range, or a prompt fits no bucket.
    """
    if steps < 1 or mean < 1 or spread < 0:
        raise UserError("--steps and --mean must be at least 1, and --spread at least 0.")
    grpo, rng = config.grpo, np.random.default_rng(config.seed)
    count = steps * grpo.prompts
    prompt_sizes, synthetic = lengths.draw(rng, count)
    centre = np.log(mean) - spread**2 / 2
    drawn = np.rint(rng.lognormal(centre, spread, (count, grpo.group_size))).astype(np.int64)
    drawn = np.clip(drawn, 1, config.rollout.max_new_tokens)
    report: dict[str, Any] = {
        "config": config.name,
        "steps": steps,
        "source": lengths.spec,
        "prompt_tokens_mean": float(prompt_sizes[:, 0].mean()),
        "prompt_tokens": _quantiles(prompt_sizes[:, 0]),
        "prompt_windows": _quantiles(prompt_sizes[:, 1]),
    }
    for name, responses in (
        ("synthetic", np.repeat(synthetic[:, None], grpo.group_size, axis=1)),
        ("drawn", drawn),
    ):
        report[name] = _padding(config, prompt_sizes, responses)
    return report


def _quantiles(values: np.ndarray) -> dict[str, int]:
    """Quantiles by their percentage."""
    chosen = (10, 50, 90, 100)
    found = np.percentile(values, chosen, method="closest_observation").tolist()
    return {f"{q}%": int(value) for q, value in zip(chosen, found, strict=True)}


def _padding(config: Config, prompt_sizes: np.ndarray, responses: np.ndarray) -> dict[str, float]:
    """The metrics of one kind of response; see `measure_padding`."""
    grpo, buckets = config.grpo, Buckets.of(config)
    size = grpo.prompts // grpo.minibatches_per_rollout
    sizes = np.column_stack((prompt_sizes, responses.max(axis=1)))
    micro_batches: list[BatchSlice] = []
    in_order = 0
    for first in range(0, len(sizes), size):
        update = sizes[first : first + size]
        micro_batches += bucket_by_length(update, grpo.micro_batch_prompts, buckets)
        in_order += BatchSlice(np.arange(size), _one_shape(config, update)).padded_tokens(
            grpo.group_size
        )
    needed = prompt_sizes[:, 0].sum() + responses.sum()
    computed = sum(batch.padded_tokens(grpo.group_size) for batch in micro_batches)
    windows = sum(len(batch.rows) * batch.shape.windows for batch in micro_batches)
    alone = prompt_sizes[:, 0].sum() + grpo.group_size * sizes[:, 2].sum()
    return {
        "response_tokens_mean": float(responses.mean()),
        "padding_share": round(float(1 - needed / computed), 4),
        "in_order_share": round(float(1 - needed / in_order), 4),
        "min_share": round(float(1 - needed / alone), 4),
        "window_padding_share": round(float(1 - prompt_sizes[:, 1].sum() / windows), 4),
        "programs": len({batch.shape for batch in micro_batches}),
    }


def _one_shape(config: Config, update: np.ndarray) -> BatchShape:
    """The shape of all micro-batches of an update that is split in order."""
    tokens, windows, longest = update.max(axis=0).tolist()
    block, limit = config.rollout.kv_block, config.rollout.max_new_tokens
    return BatchShape(
        smallest_bucket(tokens, config.data.prompt_buckets, "data.prompt_buckets"),
        smallest_bucket(windows, config.data.window_buckets, "data.window_buckets"),
        min(-(-longest // block) * block, limit),
    )

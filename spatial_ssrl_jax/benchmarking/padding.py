"""How much of a GRPO update would be padding under a config, on the tasks' own lengths."""

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
    """Cuts the updates of many steps as training does, but computes nothing.

    Responses are once as long as the cold start makes them, and once drawn from a log-normal, each
    sample for itself.

    Args:
      config: buckets, micro-batches, group and updates.
      lengths: of the tasks.
      steps: GRPO steps.
      mean: tokens of a drawn response on average.
      spread: sigma of its logarithm.

    Returns:
      By kind of response, `made` and `drawn`: `padding_share`, of token places; `in_order_share`,
      the same were each update cut in order and padded to one shape, responses to multiples of
      `rollout.kv_block`; `min_share`, had each prompt a micro-batch and a bucket of its own;
      `window_padding_share`, of vision windows; and `programs`, how many shapes were met.

    Raises:
      UserError: an argument makes no sense, or a prompt fits no bucket.
    """
    if steps < 1 or mean < 1 or spread < 0:
        raise UserError("--steps and --mean must be at least 1, and --spread at least 0.")
    grpo, rng = config.grpo, np.random.default_rng(config.seed)
    count = steps * grpo.prompts
    extents, made = lengths.draw(rng, count)
    centre = np.log(mean) - spread**2 / 2
    drawn = np.rint(rng.lognormal(centre, spread, (count, grpo.group_size))).astype(np.int64)
    drawn = np.clip(drawn, 1, config.rollout.max_new_tokens)
    report: dict[str, Any] = {
        "config": config.name,
        "steps": steps,
        "prompt_tokens_mean": float(extents[:, 0].mean()),
    }
    for name, responses in (
        ("made", np.repeat(made[:, None], grpo.group_size, axis=1)),
        ("drawn", drawn),
    ):
        report[name] = _shares(config, extents, responses)
    return report


def _shares(config: Config, extents: np.ndarray, responses: np.ndarray) -> dict[str, float]:
    """The metrics of one kind of response; see `measure_padding`."""
    grpo, buckets = config.grpo, Buckets.of(config)
    size = grpo.prompts // grpo.minibatches_per_rollout
    sizes = np.column_stack((extents, responses.max(axis=1)))
    pieces: list[BatchSlice] = []
    in_order = 0
    for first in range(0, len(sizes), size):
        update = sizes[first : first + size]
        pieces += bucket_by_length(update, grpo.micro_batch_prompts, buckets)
        in_order += BatchSlice(np.arange(size), _whole(config, update)).places(grpo.group_size)
    needed = extents[:, 0].sum() + responses.sum()
    computed = sum(piece.places(grpo.group_size) for piece in pieces)
    windows = sum(len(piece.rows) * piece.shape.windows for piece in pieces)
    rectangles = extents[:, 0].sum() + grpo.group_size * sizes[:, 2].sum()
    return {
        "response_tokens_mean": float(responses.mean()),
        "padding_share": round(float(1 - needed / computed), 4),
        "in_order_share": round(float(1 - needed / in_order), 4),
        "min_share": round(float(1 - needed / rectangles), 4),
        "window_padding_share": round(float(1 - extents[:, 1].sum() / windows), 4),
        "programs": len({piece.shape for piece in pieces}),
    }


def _whole(config: Config, update: np.ndarray) -> BatchShape:
    """The one shape of an update that is cut in order."""
    tokens, windows, longest = update.max(axis=0).tolist()
    chunk, limit = config.rollout.kv_block, config.rollout.max_new_tokens
    return BatchShape(
        smallest_bucket(tokens, config.data.prompt_buckets, "data.prompt_buckets"),
        smallest_bucket(windows, config.data.window_buckets, "data.window_buckets"),
        min(-(-longest // chunk) * chunk, limit),
    )

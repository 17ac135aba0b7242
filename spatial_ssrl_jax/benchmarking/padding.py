"""What an update computes for padding under a config, at the tasks' own lengths."""

from typing import Any

import numpy as np

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.data.lengths import Lengths
from spatial_ssrl_jax.data.packing import Content
from spatial_ssrl_jax.perf.flops import dense_flops, head_flops
from spatial_ssrl_jax.perf.response_lengths import LogNormalLengths
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.rl.row_shapes import MicroBatch, pack_micro_batches, row_cost, row_shapes
from spatial_ssrl_jax.rl.stages import GrpoStage


def measure_padding(
    config: Config,
    model: QwenVLConfig,
    lengths: Lengths,
    steps: int,
    responses: LogNormalLengths,
) -> dict[str, Any]:
    """Packs the updates of many steps as training does, but computes nothing.

    FLOPs are those of the layers' matmuls and the head; attention's are left out. Groups are packed
    as by one process, in rows laid out for `splash`: several processes, each of which packs its
    own, need a few more rows, and other kernels fewer.

    Args:
      config: rows, micro-batches, group and updates.
      model: the model's shape.
      lengths: of the tasks' prompts and synthetic responses.
      steps: GRPO steps.
      responses: what is drawn as responses.

    Returns:
      `source`, what was measured; mean and quantiles of `prompt_tokens` and `prompt_patches`; and
      by kind of response, `synthetic` and `drawn`: `flops_ratio`, computed over needed FLOPs;
      `token_padding_share`, the fraction of padded tokens; `patch_padding_share`, that of patches;
      `response_padding_share`, that of the head's rows; and `programs`, how many shapes came up.

    Raises:
      UserError: an argument is out of range, or a prompt fits no row.
    """
    alike = 0 <= responses.correlation <= 1
    if steps < 1 or responses.mean < 1 or responses.sigma < 0 or not alike:
        raise UserError(
            "--steps and --mean must be at least 1, --spread at least 0, and --correlation "
            "between 0 and 1."
        )
    grpo, rng = config.grpo, np.random.default_rng(config.seed)
    count = steps * grpo.prompts
    prompts, synthetic = lengths.draw(rng, count)
    drawn = responses.draw(rng, count, grpo.group_size)
    report: dict[str, Any] = {
        "config": config.name,
        "steps": steps,
        "source": lengths.spec,
        "prompt_tokens_mean": float(prompts[:, 0].mean()),
        "prompt_tokens": _quantiles(prompts[:, 0]),
        "prompt_patches": _quantiles(prompts[:, 1]),
    }
    for name, tokens in (
        ("synthetic", np.repeat(synthetic[:, None], grpo.group_size, axis=1)),
        ("drawn", np.minimum(drawn, config.rollout.max_new_tokens)),
    ):
        report[name] = _padding(config, model, prompts, tokens)
    return report


def _quantiles(values: np.ndarray) -> dict[str, int]:
    """Quantiles by their percentage."""
    chosen = (10, 50, 90, 100)
    found = np.percentile(values, chosen, method="closest_observation").tolist()
    return {f"{q}%": int(value) for q, value in zip(chosen, found, strict=True)}


def _padding(
    config: Config, model: QwenVLConfig, prompts: np.ndarray, lengths: np.ndarray
) -> dict[str, float]:
    """The metrics of one kind of response; see `measure_padding`."""
    stage = GrpoStage("grpo", config.grpo, 0, 0)
    shapes, size = row_shapes(config, stage), stage.update_prompts
    responses = lengths.sum(axis=1)
    contents = [
        Content(*row)
        for row in np.column_stack((prompts[:, 0] + responses, prompts[:, 1], responses))
    ]
    parts: list[MicroBatch] = []
    for first in range(0, len(contents), size):
        update = contents[first : first + size]
        parts += pack_micro_batches(update, shapes, config.grpo.micro_batch_rows, model)
    rows = [part.shape for part in parts for _ in part.rows]
    computed = np.sum([shape.capacity for shape in rows], axis=0)
    needed = np.sum(contents, axis=0)
    useful = needed[0] * dense_flops(model.text) + needed[2] * head_flops(model.text)
    useful += 2.0 * needed[1] * model.vision.block_weights
    tokens, patches, places = (1 - needed / computed).tolist()
    return {
        "response_tokens_mean": float(lengths.mean()),
        "flops_ratio": round(2 * sum(row_cost(shape, model) for shape in rows) / useful, 4),
        "token_padding_share": round(tokens, 4),
        "patch_padding_share": round(patches, 4),
        "response_padding_share": round(places, 4),
        "programs": len(set(rows)),
    }

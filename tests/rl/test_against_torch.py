"""GRPO's loss and gradient against torch: Transformers' model, one sample after another."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from spatial_ssrl_jax.config.schema import GrpoSettings
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.family import config_to_dict
from spatial_ssrl_jax.qwen_vl.pixels import normalize_patches
from spatial_ssrl_jax.qwen_vl.qwen2_5 import lay_out_windows
from spatial_ssrl_jax.qwen_vl.weights import entries, write_params
from spatial_ssrl_jax.rl.losses import GrpoLoss
from tests.rl.conftest import CONFIG, GRIDS

torch = pytest.importorskip("torch", reason="compares with Transformers, which needs torch")

TEMPERATURE = 0.7
LIMIT = 1e-4


@pytest.fixture(scope="module")
def reference(small_params, tmp_path_factory: pytest.TempPathFactory):
    """Transformers' model with the same weights."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("reference")
    (folder / "config.json").write_text(json.dumps(config_to_dict(CONFIG, "float32")))
    write_params(folder, CONFIG, small_params, "float32")
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def logprobs(model, batch, b: int, response: np.ndarray):
    """Log-probabilities of one response to prompt `b`, the prompt run for it alone."""
    length = int(batch.prompts.length[b])
    ids = torch.tensor(np.concatenate((batch.prompts.ids[b, :length], response))[None].astype(int))
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == CONFIG.image_token_id).int()}
    if GRIDS[b]:
        layout = lay_out_windows(CONFIG.vision, GRIDS[b])
        held = layout.source >= 0
        pixels = np.zeros((held.sum(), CONFIG.vision.patch_dim), np.float32)
        windows = len(layout.source)
        patches = jnp.asarray(batch.prompts.vision.patches[b, :windows])
        pixels[layout.source[held]] = np.asarray(normalize_patches(patches, CONFIG.vision))[held]
        inputs |= {
            "pixel_values": torch.tensor(pixels),
            "image_grid_thw": torch.tensor(GRIDS[b]),
        }
    logits = model(**inputs).logits[0, length - 1 : -1] / TEMPERATURE
    return torch.log_softmax(logits, -1)[torch.arange(len(response)), torch.tensor(response)]


def sample_loss(logprob, old, reference, advantage: float):
    """The loss as the paper states it (arXiv 2510.27606), for the tokens of one sample, summed."""
    ratio = torch.exp(torch.clamp(logprob - old, -20, 20))
    policy = torch.maximum(-advantage * ratio, -advantage * torch.clamp(ratio, 0.8, 1.3))
    if advantage < 0:
        policy = torch.minimum(policy, torch.tensor(-3.0 * advantage))
    d = torch.clamp(reference - logprob, -20, 20)
    return (policy + 0.01 * torch.clamp(torch.exp(d) - d - 1, -10, 10)).sum()


def test_loss_and_gradient(small_params, mixed_batch, reference, measure):
    total = 0.0
    for b, g in np.ndindex(mixed_batch.length.shape):
        n = int(mixed_batch.length[b, g])
        rows = (
            torch.tensor(x[b, g, :n])
            for x in (mixed_batch.old_logprobs, mixed_batch.reference_logprobs)
        )
        found = logprobs(reference, mixed_batch, b, mixed_batch.tokens[b, g, :n].astype(int))
        value = sample_loss(found, *rows, float(mixed_batch.advantage[b, g]))
        total = total + value * float(mixed_batch.weight[b, g])
    total.backward()

    loss = GrpoLoss(
        CONFIG, Compute(attention_chunk=16, vocab_block=32), GrpoSettings(temperature=TEMPERATURE)
    )
    program = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, _), gradients = program(small_params, mixed_batch)
    assert float(value) == pytest.approx(float(total.detach()), rel=LIMIT)
    hub = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): p
        for name, p in reference.named_parameters()
    }
    flat = traverse_util.flatten_dict(gradients, sep="/")
    for entry in entries(CONFIG):
        parts = [entry.from_hub(hub[name].grad.numpy()) for name in entry.hub_names]
        theirs = np.stack(parts) if entry.layers else parts[0]
        assert np.abs(theirs).max() > 0, entry.path
        assert measure(entry.path, flat[entry.path], theirs) < LIMIT, entry.path

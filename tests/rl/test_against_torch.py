"""GRPO's loss and gradient against torch: Transformers' model, one sample after another."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from spatial_ssrl_jax.config.schema import GrpoSettings
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.family import config_to_dict
from spatial_ssrl_jax.qwen_vl.pixels import normalize_patches
from spatial_ssrl_jax.qwen_vl.qwen2_5 import lay_out_patches
from spatial_ssrl_jax.qwen_vl.weights import entries, write_params
from spatial_ssrl_jax.rl.losses import GrpoLoss, grpo_loss
from tests.helpers.groups import unpack
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


def logprobs(model, mixed, b: int, response: np.ndarray):
    """Log-probabilities of one response to prompt `b`, the prompt run for it alone."""
    prompt = mixed.prompts[b]
    length = len(prompt.ids)
    ids = torch.tensor(np.concatenate((prompt.ids, response))[None].astype(int))
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == CONFIG.image_token_id).int()}
    if GRIDS[b]:
        layout = lay_out_patches(CONFIG.vision, GRIDS[b])
        pixels = np.zeros((len(layout.source), CONFIG.vision.patch_dim), np.float32)
        patches = jnp.asarray(prompt.patches)
        pixels[layout.source] = np.asarray(normalize_patches(patches, CONFIG.vision))
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


def variant_loss(s: GrpoSettings, logprob, old, sampled, advantage: float):
    """GSPO (2507.18071, eq. 5), CISPO (2506.13585, eq. 4) or PPO, for the tokens of one sample.

    Each with its correction by the ratio of trainer to sampler; summed.
    """
    ratio = torch.exp(logprob - old)
    if s.policy_loss == "gspo":
        ratio = torch.exp((logprob - old).sum() / len(old)).expand(len(old))
    bounded = torch.clamp(ratio, 1 - s.clip_low, 1 + s.clip_high)
    policy = -torch.minimum(ratio * advantage, bounded * advantage)
    if s.policy_loss == "cispo":
        policy = -bounded.detach() * advantage * logprob
    gap = old - sampled
    correction = torch.exp(gap.sum() if s.importance_level == "sequence" else gap)
    if s.importance_correction == "truncate":
        policy = policy * torch.clamp(correction, max=s.importance_max)
    elif s.importance_correction == "mask":
        outside = (correction > s.importance_max) | (correction < 1 / s.importance_max)
        policy = policy * correction.masked_fill(outside, 0.0)
    return policy.sum()


@pytest.mark.parametrize(
    "changes",
    [
        {"policy_loss": "gspo"},
        {"policy_loss": "gspo", "clip_low": 0.05, "clip_high": 0.05},
        {"policy_loss": "cispo"},
        {"importance_correction": "truncate", "importance_level": "sequence"},
        {"importance_correction": "mask", "importance_level": "sequence"},
        {
            "policy_loss": "gspo",
            "importance_correction": "truncate",
            "importance_level": "sequence",
        },
    ],
    ids=lambda changes: "+".join(map(str, changes.values())),
)
def test_gradients_of_the_other_losses(mixed, changes: dict):
    """By log-probability, near the old ones, so that some ratios are clipped and some are not."""
    settings = GrpoSettings(dual_clip=0.0, **changes)
    packed, places = mixed.packed_with_places(CONFIG, [[0, 2], [1]])
    batch = replace(packed, reference_logprobs=None)
    rng = np.random.default_rng(3)
    logprob = (mixed.old_logprobs + rng.normal(0, 0.2, mixed.tokens.shape)).astype(np.float32)

    def loss(x):
        return grpo_loss(settings, batch, x, 0 * x)[0]

    value, slope = jax.value_and_grad(loss)(jnp.asarray(places.of_tokens(logprob)))
    slope = unpack(places, slope, logprob.shape)
    theirs = torch.tensor(logprob, requires_grad=True)
    total = torch.zeros(())
    for b, g in np.ndindex(mixed.length.shape):
        n = int(mixed.length[b, g])
        old, sampled = (
            torch.tensor(x[b, g, :n]) for x in (mixed.old_logprobs, mixed.sampled_logprobs)
        )
        advantage, weight = float(mixed.advantage[b, g]), float(mixed.weight[b, g])
        total = total + weight * variant_loss(settings, theirs[b, g, :n], old, sampled, advantage)
    total.backward()
    assert float(value) == pytest.approx(float(total.detach()), rel=1e-5)
    np.testing.assert_allclose(slope, theirs.grad, rtol=1e-4, atol=1e-7)
    assert np.abs(slope).max() > 1e-3


def test_loss_and_gradient(small_params, mixed, mixed_batch, reference, measure):
    total = 0.0
    for b, g in np.ndindex(mixed.length.shape):
        n = int(mixed.length[b, g])
        rows = (torch.tensor(x[b, g, :n]) for x in (mixed.old_logprobs, mixed.reference_logprobs))
        found = logprobs(reference, mixed, b, mixed.tokens[b, g, :n].astype(int))
        value = sample_loss(found, *rows, float(mixed.advantage[b, g]))
        total = total + value * float(mixed.weight[b, g])
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

"""The model against Transformers, on random weights at real head sizes, fp32."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_ssrl_jax.data.batching import pad_prompts, pad_responses
from spatial_ssrl_jax.data.packing import Content
from spatial_ssrl_jax.qwen_vl import model as qwen
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.inputs import VisionInput
from spatial_ssrl_jax.qwen_vl.pixels import normalize_patches
from spatial_ssrl_jax.qwen_vl.qwen2_5 import lay_out_patches, mrope_positions
from spatial_ssrl_jax.qwen_vl.rope import text_rotary
from spatial_ssrl_jax.rollout.decode import prefill
from spatial_ssrl_jax.rollout.engine import Engine
from spatial_ssrl_jax.rollout.sampling import GREEDY
from tests.helpers.groups import pack_groups

torch = pytest.importorskip("torch", reason="compares with Transformers, which needs torch")

IMAGES = ("one", "five", "dot", "strip", "ragged", "none")
BATCHED = (*IMAGES, "mixed", "video of 16 at 1")
NAMES = (*BATCHED, *(f"video of {n}" for n in ("4 at 1", "4 at 2", "7 at 1", "7 at 2", "16 at 2")))
COMPUTE = Compute(attention_chunk=1024)
SHAPE = (192, 600)
RESPONSES = (9, 5)  # tokens of the two responses after each prompt
ROW = Content(SHAPE[0] + sum(RESPONSES), SHAPE[1], sum(RESPONSES))  # of one prompt at most
LIMIT = 2e-4


def pad(questions, names):
    return pad_prompts([questions[name].prompt for name in names], *SHAPE)


def responses_to(name):
    """Two responses of random tokens, different for each prompt."""
    rng = np.random.default_rng(NAMES.index(name))
    return [rng.integers(0, 151_000, length).astype(np.int32) for length in RESPONSES]


@pytest.fixture(scope="module")
def reference(checkpoint, questions, as_numpy):
    """Transformers' vision output, caches, hidden states and logits, computed once a prompt."""

    @cache
    @torch.no_grad()
    def run(name):
        model = checkpoint.torch_model
        question, found = questions[name], {"hidden": [], "logits": []}
        if question.grids is not None:
            visual = model.model.visual(question.patches, grid_thw=question.grids)
            found["vision"] = as_numpy(visual.pooler_output)
        length = question.inputs["input_ids"].shape[1]
        for response in responses_to(name):
            out = model.model(**question.followed_by(response), use_cache=True)
            hidden = out.last_hidden_state[0]
            predicting = hidden[length - 1 : -1]
            found["hidden"].append(as_numpy(predicting))
            found["logits"].append(as_numpy(model.lm_head(predicting)))
        caches = out.past_key_values.layers
        found["keys"] = [as_numpy(layer.keys[0, :, :length]) for layer in caches]
        found["values"] = [as_numpy(layer.values[0, :, :length]) for layer in caches]
        return found

    return run


@partial(jax.jit, static_argnums=(0, 1))
def run_vision(config, compute, params, vision):
    model, compute = qwen.bind(config, params), replace(compute, remat="none")
    return qwen.encode_vision(model, vision, compute, merge=True).tokens


@partial(jax.jit, static_argnums=(0, 1))
def run_rows(config, compute, params, rows):
    """Hidden states and logits of the response tokens of packed rows."""
    model = qwen.bind(config, params)
    hidden = qwen.packed_hidden(config, model, rows, compute)
    return hidden, hidden @ model.text.head_weight(jnp.float32).T


def run_packed(checkpoint, questions, names):
    """What `run_rows` gives of prompts with their responses, all in one row, and where it is."""
    prompts = [questions[name].prompt for name in names]
    padded = pad_responses([responses_to(name) for name in names], 12)
    order = [range(len(names))]
    rows, places = pack_groups(checkpoint.config, prompts, *padded, order, spare=0, least=ROW)
    return run_rows(checkpoint.config, COMPUTE, checkpoint.params, rows), places


@pytest.mark.parametrize("name", NAMES)
def test_prompt_is_the_processors(checkpoint, questions, name):
    """Ids, patches, positions and the next position, against Transformers' own code."""
    question = questions[name]
    prompt, inputs, grids = question.prompt, question.inputs, question.grids
    np.testing.assert_array_equal(prompt.ids, inputs["input_ids"][0])
    model = checkpoint.torch_model.model
    described = {k: v for k, v in inputs.items() if not k.startswith("pixel_values")}
    position, delta = model.get_rope_index(**described)
    np.testing.assert_array_equal(prompt.position, position[:, 0])
    assert prompt.position.max() + 1 == int(delta) + len(prompt.ids)
    response = {k: v for k, v in question.followed_by([5]).items() if k in described}
    assert prompt.next_position == int(model.get_rope_index(**response)[0][0, 0, -1])
    if grids is not None:
        layout = lay_out_patches(checkpoint.config.vision, [tuple(g) for g in grids.tolist()])
        pixels = question.patches.numpy()
        found = normalize_patches(jnp.asarray(prompt.patches), checkpoint.config.vision)
        np.testing.assert_allclose(found, pixels[layout.source], rtol=0, atol=1e-6)
        assert len(prompt.patches) == len(pixels)


@pytest.mark.parametrize("seconds", [[0.5, 1.0], [2.0, 1.3], [2 / 29.97, 2 / 3], [0.35, 1.9]])
def test_positions_of_images_and_videos(checkpoint, seconds):
    """A prompt that mixes images and videos, whose frames are spaced by their seconds."""
    config = checkpoint.config
    grids, kinds = [(1, 4, 6), (4, 6, 4), (1, 2, 8), (3, 4, 4)], [1, 2, 1, 2]
    types, times = [0] * 5, iter(seconds)
    for (t, h, w), kind in zip(grids, kinds, strict=True):
        types += [kind] * (t * h * w // 4) + [0] * 3
    types = np.array(types)
    position, _ = checkpoint.torch_model.model.get_rope_index(
        torch.zeros(1, len(types), dtype=torch.long),
        torch.tensor(types[None]),
        image_grid_thw=torch.tensor(grids[::2]),
        video_grid_thw=torch.tensor(grids[1::2]),
        second_per_grid_ts=torch.tensor(seconds),
    )
    per_grid = [None if kind == 1 else next(times) for kind in kinds]
    ours = mrope_positions(config.vision, types > 0, grids, per_grid)
    np.testing.assert_array_equal(ours, position[:, 0])


@pytest.mark.parametrize("name", [n for n in NAMES if n != "none"])
def test_vision_tower(checkpoint, questions, reference, measure, name):
    batch = pad(questions, [name])
    merged = run_vision(checkpoint.config, COMPUTE, checkpoint.params, batch.vision)
    index = batch.image_index[0]
    assert (
        measure(f"vision {name}", merged[0][index[index >= 0]], reference(name)["vision"]) < LIMIT
    )


@pytest.mark.parametrize("grids", [[(1, 42, 74)], [(1, 4, 6), (4, 10, 18)]], ids=["large", "video"])
def test_vision_tower_on_given_patches(checkpoint, measure, as_numpy, grids):
    """An image of 588x1036 pixels, more patches than attend at a time; an image and a video."""
    config = checkpoint.config.vision
    rng, count = np.random.default_rng(0), sum(int(np.prod(g)) for g in grids)
    patches = rng.integers(0, 256, (count, config.patch_dim), np.uint8)
    pixels = np.asarray(normalize_patches(jnp.asarray(patches), config))
    with torch.no_grad():
        tower = checkpoint.torch_model.model.visual
        expected = tower(torch.tensor(pixels), grid_thw=torch.tensor(grids)).pooler_output
    layout = lay_out_patches(config, grids)
    vision = VisionInput(patches[layout.source][None], layout.frame[None], layout.coords[None])
    merged = run_vision(checkpoint.config, COMPUTE, checkpoint.params, vision)[0]
    assert measure("vision", merged[layout.merged], as_numpy(expected)) < LIMIT


def check_prefill(found, row, length, expected, measure, name):
    """Keys and values of every layer and the last hidden state of one row."""
    hidden, prefix = found
    for i, (keys, values) in enumerate(prefix.layers):
        assert measure(f"keys {i} {name}", keys[row, :, :length], expected["keys"][i]) < LIMIT
        assert measure(f"values {i} {name}", values[row, :, :length], expected["values"][i]) < LIMIT
    assert measure(f"last hidden {name}", hidden[row], expected["hidden"][0][0]) < LIMIT


@partial(jax.jit, static_argnums=0)
def run_layers(config, params, prompts):
    """The first layer's input, and the last norm's output."""
    model = qwen.bind(config, params)
    x = qwen.embed_prompt(model, prompts, COMPUTE)
    rotary = text_rotary(config.text, prompts.position)
    return x, model.text.prefill(x, rotary, prompts.valid, COMPUTE)[0]


@pytest.mark.parametrize("name", ["five", "mixed"])
def test_hidden_states_of_every_layer(checkpoint, questions, measure, as_numpy, name):
    """The model truncated after each of its layers, at every token."""
    model, config = checkpoint.torch_model.model, checkpoint.config
    with torch.no_grad():
        out = model(**questions[name].inputs, output_hidden_states=True)
        expected_of = [
            *map(model.language_model.norm, out.hidden_states[1:-1]),
            out.hidden_states[-1],
        ]
    length, text = len(questions[name].prompt.ids), checkpoint.params["text"]
    for depth, expected in enumerate(expected_of, 1):
        truncated = replace(config, text=replace(config.text, num_hidden_layers=depth))
        layers = jax.tree.map(lambda x, depth=depth: x[:depth], text["layers"])
        params = {**checkpoint.params, "text": {**text, "layers": layers}}
        first, found = run_layers(truncated, params, pad(questions, [name]))
        value = measure(f"hidden {depth} {name}", found[0, :length], as_numpy(expected[0]))
        assert value < LIMIT
    embedded = as_numpy(out.hidden_states[0][0])
    assert measure(f"embedded {name}", first[0, :length], embedded) < LIMIT


def check_responses(found, group, expected, measure, name):
    (hidden, logits), places = found
    for g, length in enumerate(RESPONSES):
        mine = (places.group == group) & (places.sample == g)
        assert mine.sum() == length
        assert measure(f"hidden {name}", hidden[mine], expected["hidden"][g]) < LIMIT
        assert measure(f"logits {name}", logits[mine], expected["logits"][g]) < LIMIT


@pytest.mark.parametrize("name", NAMES)
def test_one_prompt(checkpoint, questions, reference, measure, name):
    """A prompt alone, and two responses after it: every layer's cache, hidden states, logits."""
    batch = pad(questions, [name])
    found = prefill(checkpoint.config, COMPUTE, checkpoint.params, batch)
    check_prefill(found, 0, batch.length[0], reference(name), measure, name)
    found = run_packed(checkpoint, questions, [name])
    check_responses(found, 0, reference(name), measure, name)


def test_padded_batch(checkpoint, questions, reference, measure):
    """All prompts at once, of different lengths and with different images."""
    batch = pad(questions, BATCHED)
    assert len(set(batch.length.tolist())) == len(BATCHED)
    caches = prefill(checkpoint.config, COMPUTE, checkpoint.params, batch)
    found = run_packed(checkpoint, questions, BATCHED)
    for row, name in enumerate(BATCHED):
        check_prefill(caches, row, batch.length[row], reference(name), measure, f"batch {name}")
        check_responses(found, row, reference(name), measure, f"batch {name}")


def test_greedy_continuation(checkpoint, questions):
    """32 greedy tokens of each prompt in a batch are those of Transformers' `generate`."""
    new = 32
    engine = Engine(checkpoint.config, COMPUTE, stop_ids=(), kv_block=new, check_every=8)
    rollout = engine.generate(
        checkpoint.params,
        engine.fill(checkpoint.params),
        [pad(questions, BATCHED)],
        group_size=1,
        max_new_tokens=new,
        key=jax.random.key(0),
        prompt_index=[np.arange(len(BATCHED))],
        sampling=GREEDY,
    )
    for row, name in enumerate(BATCHED):
        out = checkpoint.torch_model.generate(
            **questions[name].inputs,
            max_new_tokens=new,
            do_sample=False,
            repetition_penalty=1.0,
            suppress_tokens=list(checkpoint.config.vision_tokens),
        )
        expected = out[0, -new:].tolist()
        assert rollout.tokens[row, 0].tolist() == expected, name
        assert len(set(expected)) > new // 2, "the weights are too small to tell right from wrong"

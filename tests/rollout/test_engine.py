"""Rollouts: log-probabilities, where responses end, and what the draws depend on."""

from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import MeshSettings
from spatial_ssrl_jax.data.batching import pad_prompts
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl import model as qwen
from spatial_ssrl_jax.qwen_vl.compute import XLA, AttentionKernel, Compute
from spatial_ssrl_jax.rollout import engine, live_rows
from spatial_ssrl_jax.rollout.decode import prefill
from spatial_ssrl_jax.rollout.engine import Engine, RolloutBatch
from spatial_ssrl_jax.rollout.sampling import GREEDY, Sampling
from spatial_ssrl_jax.rollout.schedule import DecodeShape, RolloutUse, Schedule
from tests.helpers.groups import pack_groups, unpack

LIMIT, GROUP = 24, 3
STOPS = tuple(range(0, 680, 17))  # some 6% of what is drawn ends a response
WARM = Sampling(temperature=0.8)
GREEDY_LAST = replace(WARM, greedy_last=True)
BUCKET = (32, 100)


@pytest.fixture(scope="module")
def prompts(toy):
    grids = ([(1, 4, 6), (1, 2, 10)], [], [(1, 6, 2)], [(1, 10, 4)])
    return [toy.prompt(i, 8 + i, g) for i, g in enumerate(grids)]


@pytest.fixture(scope="module")
def generate(toy, prompts):
    """A rollout of the prompts at the given indices in the step."""

    def run(
        index=range(4), chunk=12, check_every=4, bucket=BUCKET, group=GROUP, shards=1, **settings
    ):
        params = settings.pop("params", toy.params)
        stops = settings.pop("stops", STOPS)
        compute = Compute(attention_chunk=16, decode_attention=settings.pop("decode_kernel", XLA))
        layout = settings.pop("layout", None)
        made = Engine(toy.config, compute, stops, chunk, check_every, shards, layout)
        index = list(index)
        return made.generate(
            params,
            made.fill(params),
            [pad_prompts([prompts[i] for i in index], bucket[0], bucket[1])],
            group_size=group,
            **{"max_new_tokens": LIMIT, "key": jax.random.key(5), "sampling": WARM, **settings},
            prompt_index=[np.array(index) + 100],
        )

    return run


@pytest.fixture(scope="module")
def rollout(generate):
    return generate()


def test_responses_end_where_they_should(rollout):
    """At the first end token, which counts; else at the limit, unfinished. Zero after."""
    assert rollout.finished.any() and not rollout.finished.all()
    for b, g in np.ndindex(rollout.length.shape):
        length = rollout.length[b, g]
        tokens, logprobs = rollout.tokens[b, g], rollout.logprobs[b, g]
        ends = np.isin(tokens[:length], STOPS)
        assert not ends[:-1].any()
        assert ends[-1] == rollout.finished[b, g]
        assert rollout.finished[b, g] or length == LIMIT
        assert (tokens[length:] == 0).all() and (logprobs[length:] == 0).all()
        assert (logprobs[:length] < 0).all()


def test_the_gpus_kernel_draws_the_same(generate, rollout):
    """In interpret mode, without a GPU, its fused weights sharded as in training; caches are
    written in place and grow by chunks."""
    layout = Layout(make_mesh(MeshSettings())).rollout(1)
    found = generate(decode_kernel=AttentionKernel("triton", interpret=True), layout=layout)
    assert np.array_equal(found.tokens, rollout.tokens)
    assert np.abs(found.logprobs - rollout.logprobs).max() < 1e-5


def test_samples_of_a_group_differ(rollout):
    rows = rollout.tokens.reshape(-1, LIMIT)
    assert len(np.unique(rows, axis=0)) == len(rows)


@partial(jax.jit, static_argnums=0)
def recompute(config, params, rows):
    model, compute = qwen.bind(config, params), Compute()
    hidden = qwen.packed_hidden(config, model, rows, compute)
    logits = hidden @ model.text.head_weight(jnp.float32).T
    every = jax.nn.log_softmax(logits / WARM.temperature)
    return jnp.take_along_axis(every, rows.label[..., None], axis=-1)[..., 0]


def test_logprobs_equal_recomputed_ones(toy, prompts, rollout):
    sampled = rollout.tokens, rollout.length
    rows, places = pack_groups(toy.config, prompts, *sampled, [[0, 1], [2, 3]])
    found = unpack(places, recompute(toy.config, toy.params, rows), rollout.tokens.shape)
    held = np.arange(LIMIT) < rollout.length[..., None]
    assert held.sum() > 100 and np.ptp(rollout.logprobs[held]) > 3
    assert np.abs(found - rollout.logprobs)[held].max() < 1e-4


def assert_same(found, rollout, rows=slice(None), group=GROUP):
    np.testing.assert_array_equal(found.tokens, rollout.tokens[rows, :group])
    np.testing.assert_array_equal(found.length, rollout.length[rows, :group])
    np.testing.assert_array_equal(found.finished, rollout.finished[rows, :group])
    np.testing.assert_allclose(found.logprobs, rollout.logprobs[rows, :group], atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [dict(chunk=8, check_every=2), dict(chunk=24, check_every=3, bucket=(45, 100))],
    ids=["small chunks", "one chunk, larger bucket"],
)
def test_draws_do_not_depend_on_how_it_is_run(generate, rollout, settings):
    assert_same(generate(**settings), rollout)


def test_draws_do_not_depend_on_the_batch(generate, rollout):
    """A prompt alone, and two in another order, with fewer samples."""
    assert_same(generate([2], group=2, chunk=24), rollout, [2], group=2)
    assert_same(generate([3, 0], group=2, chunk=24), rollout, [3, 0], group=2)


def test_finished_samples_leave(generate, monkeypatch):
    """Their rows go, prompts with several unfinished ones take several, and nothing else changes.

    What is decoded is what the schedule says of such lengths.
    """
    spans, sizes = [], []
    decode, use = engine.decode_chunk, engine.RolloutUse.of

    def watched(*args):
        sizes.append((*args[5].finished.shape, args[5].layers[0][0].shape[3]))
        return decode(*args)

    def kept(found, *rest):
        spans.extend(found)
        return use(found, *rest)

    monkeypatch.setattr(engine, "decode_chunk", watched)
    monkeypatch.setattr(engine.RolloutUse, "of", kept)
    often = dict(stops=tuple(range(0, 680, 8)), check_every=2, group=4)
    shrunk = generate(**often, chunk=4)
    assert sizes[0] == (4, 4, 4) and sizes[-1] == (1, 1, LIMIT), sizes
    assert (4, 4, 8) in sizes and any(size[:2] == (2, 2) for size in sizes), sizes
    length = np.minimum(shrunk.length, LIMIT)
    schedule = Schedule.of(4, 4, LIMIT, kv_block=4, check_every=2, prompt_tokens=BUCKET[0])
    assert spans == schedule.simulate(length)
    assert shrunk.use.tokens == length.sum()
    assert shrunk.use.rows == sum(
        b * g * span.steps for (b, g, _), span in zip(sizes, spans, strict=True)
    )
    sizes.clear()
    whole = generate(**often, chunk=24)
    assert set(sizes) == {(4, 4, LIMIT)} and whole.use.columns > 2 * shrunk.use.columns
    assert_same(shrunk, whole, group=4)


def test_prompts_are_prefilled_in_parts(generate, rollout, prompts, toy):
    """Of sizes of their own; the responses are the same."""
    made = Engine(toy.config, Compute(attention_chunk=16), STOPS, 12, 4)
    found = made.generate(
        toy.params,
        made.fill(toy.params),
        [pad_prompts(prompts[:1], 28, 60), pad_prompts(prompts[1:], *BUCKET)],
        group_size=GROUP,
        max_new_tokens=LIMIT,
        key=jax.random.key(5),
        prompt_index=[np.array([100]), np.array([101, 102, 103])],
        sampling=WARM,
    )
    assert_same(found, rollout)
    assert found.use.prefilled == 28 + 3 * 32 and found.use.prompt_tokens == 23 + 9 + 15 + 23


def test_pixels_of_two_prefills_are_on_the_device(toy, prompts, rollout, monkeypatch):
    """A batch is taken when the prefill before the last one has ended."""
    waited, prefill, join = [], engine.prefill, engine.join_prefills

    class Hidden(list):
        def block_until_ready(self):
            waited.append(self)

    def batches():
        for n, prompt in enumerate(prompts):
            assert len(waited) == max(n - 1, 0)
            yield pad_prompts([prompt], *BUCKET)

    def prefilled(*args):
        hidden, prefix = prefill(*args)
        return Hidden([hidden]), prefix

    monkeypatch.setattr(engine, "prefill", prefilled)
    monkeypatch.setattr(
        engine, "join_prefills", lambda parts, layout: join([(h[0], p) for h, p in parts], layout)
    )
    made = Engine(toy.config, Compute(attention_chunk=16), STOPS, 12, 4)
    found = made.generate(
        toy.params,
        made.fill(toy.params),
        batches(),
        group_size=GROUP,
        max_new_tokens=LIMIT,
        key=jax.random.key(5),
        prompt_index=[np.array([100 + n]) for n in range(4)],
        sampling=WARM,
    )
    assert_same(found, rollout)


@pytest.mark.parametrize(
    ("every", "parts", "kinds"), [(6, 1, {"wait", "full"}), (9, 2, {"wait", "go on"})]
)
def test_leftovers_of_several_batches_are_decoded_together(
    every, parts, kinds, toy, prompts, monkeypatch
):
    """Their responses are the same, and what is decoded is what the schedule says.

    A batch that goes on needs their memory: they have ended before.
    """
    layout = Layout(make_mesh(MeshSettings())).rollout(1)
    stops = tuple(range(0, 680, every))
    made = Engine(toy.config, Compute(attention_chunk=16), stops, 4, 2, layout=layout)
    settings = dict(group_size=4, max_new_tokens=LIMIT, key=jax.random.key(5), sampling=WARM)
    pairs = [(0, 1), (2, 3), (3, 0), (1, 2), (2, 0)]
    # The last bucket's prompts wait in caches of the others' size.
    buckets = [BUCKET, BUCKET, BUCKET, BUCKET, (28, 60)]
    batches = []
    for i, (pair, bucket) in enumerate(zip(pairs, buckets, strict=True)):
        split = np.split(np.arange(2), parts)
        filled = [pad_prompts([prompts[pair[n]] for n in part], *bucket) for part in split]
        batches.append(RolloutBatch(filled, [100 + 2 * i + part for part in split]))
    weights = made.fill(toy.params)
    apart = [
        made.generate(toy.params, weights, b.prompts, prompt_index=b.index, **settings)
        for b in batches
    ]
    seen, spans, waiting = set(), [], []

    def watch(owner, name: str, note) -> None:
        called = getattr(owner, name)

        def noted(*args):
            found = called(*args)
            note(args, found)
            return found

        monkeypatch.setattr(owner, name, noted)

    def added(args, _) -> None:
        seen.add("wait")
        waiting.append(args)

    def resized(args, _) -> None:
        assert args[1] != DecodeShape(2, 4, 16) or not waiting

    leftovers = live_rows.Leftovers
    watch(leftovers, "add", added)
    watch(leftovers, "take", lambda *_: waiting.clear())
    watch(leftovers, "have_room", lambda _, found: seen.update(() if found else {"full"}))
    watch(Schedule, "fits_leftovers", lambda _, found: seen.update(() if found else {"go on"}))
    watch(live_rows.LiveRows, "resize", resized)
    watch(RolloutUse, "of", lambda args, _: spans.extend(args[0]))
    merged = made.generate_batches(toy.params, weights, batches, longest_prompt=32, **settings)
    monkeypatch.undo()
    assert seen == kinds
    for found, expected in zip(merged, apart, strict=True):
        assert_same(found, expected, group=4)
    schedule = made.schedule(2, 4, LIMIT, 32, WARM, len(pairs))
    assert schedule.leftovers == DecodeShape(2, 1, 8)
    expected = schedule.simulate(*(found.length for found in merged))
    assert Counter(spans) == Counter(expected)
    assert sum(found.use.steps for found in merged) == sum(span.steps for span in expected)
    assert sum(found.use.tokens for found in merged) == sum(f.length.sum() for f in merged)


@pytest.mark.parametrize("settings", [{"on_tokens": lambda *_: None}, {"sampling": GREEDY_LAST}])
def test_nothing_waits_where_all_rows_are_needed(toy, prompts, settings, monkeypatch):
    """Who sees tokens sees those of a batch, and whole groups stay together."""
    monkeypatch.setattr(live_rows.Leftovers, "add", None)
    made = Engine(toy.config, Compute(attention_chunk=16), tuple(range(0, 680, 6)), 4, 2)
    batches = [RolloutBatch([pad_prompts(prompts[:2], *BUCKET)], [np.arange(2)])] * 3
    given = {"group_size": 4, "max_new_tokens": LIMIT, "key": jax.random.key(5), "sampling": WARM}
    weights = made.fill(toy.params)
    found = made.generate_batches(
        toy.params, weights, batches, longest_prompt=32, **(given | settings)
    )
    assert len(found) == 3 and found[0].length.max() > 8


def test_tokens_are_shown_as_they_are_drawn(generate, rollout):
    """Every `check_every` steps, across chunks; the callback changes nothing."""
    seen = []
    found = generate(chunk=12, check_every=4, on_tokens=lambda *now: seen.append(now))
    assert_same(found, rollout)
    assert len(seen) == LIMIT // 4
    for i, (tokens, length) in enumerate(seen, 1):
        np.testing.assert_array_equal(length, np.minimum(rollout.length, 4 * i))
        np.testing.assert_array_equal(tokens[:, :, : 4 * i], rollout.tokens[:, :, : 4 * i])
        assert (tokens[:, :, 4 * i :] == 0).all()


def test_another_key_draws_other_tokens(generate, rollout):
    other = generate(key=jax.random.key(6))
    assert (other.tokens[:, :, 0] != rollout.tokens[:, :, 0]).any()


def test_loop_ends_with_the_last_response(generate):
    """When every token ends a response, each is one token long."""
    found = generate(stops=tuple(range(700)))
    assert (found.length == 1).all() and found.finished.all()
    assert (found.tokens[:, :, 1:] == 0).all()


def test_without_end_tokens_all_run_to_the_limit(generate):
    found = generate(stops=(), chunk=24)
    assert (found.length == LIMIT).all() and not found.finished.any()


def test_greedy_samples_are_equal_and_likeliest(toy, prompts, generate):
    found = generate(sampling=GREEDY, stops=(), chunk=24)
    for g in range(1, GROUP):
        np.testing.assert_array_equal(found.tokens[:, g], found.tokens[:, 0])
    assert len(np.unique(found.tokens)) > LIMIT // 2
    hidden, _ = prefill(
        toy.config, Compute(attention_chunk=16), toy.params, pad_prompts(prompts, 32, 100)
    )
    first = np.asarray(hidden) @ np.asarray(toy.params["text"]["head"]).T
    np.testing.assert_array_equal(found.tokens[:, 0, 0], first.argmax(-1))


def test_the_last_sample_alone_is_greedy(generate, rollout):
    """Greedy and sampled responses share the prompts; each is as if drawn apart."""
    found = generate(group=GROUP + 1, sampling=GREEDY_LAST)
    greedy = generate(group=1, sampling=GREEDY)
    for name in ("tokens", "length", "finished"):
        mixed, drawn = getattr(found, name), getattr(rollout, name)
        np.testing.assert_array_equal(mixed[:, :-1], drawn)
        np.testing.assert_array_equal(mixed[:, -1:], getattr(greedy, name))
    np.testing.assert_allclose(found.logprobs[:, :-1], rollout.logprobs, atol=1e-5)
    np.testing.assert_allclose(found.logprobs[:, -1:], greedy.logprobs, atol=1e-5)


def test_the_last_sample_stays_greedy_as_groups_leave(generate):
    often = dict(stops=tuple(range(0, 680, 8)), check_every=2, group=4)
    often["sampling"] = GREEDY_LAST
    shrunk, whole = generate(**often, chunk=4), generate(**often, chunk=24)
    assert shrunk.use.rows < whole.use.rows
    assert (np.ptp(shrunk.length, axis=1) > 4).any()
    assert_same(shrunk, whole, group=4)


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_vision_tokens_are_never_written(toy, generate, sampling):
    """Two vision tokens with opposite head rows: at each step one has by far the largest logit."""
    head = np.array(toy.params["text"]["head"])
    row = 200 * np.random.default_rng(0).normal(size=head.shape[1])
    image, video = toy.config.image_token_id, toy.config.video_token_id
    head[image], head[video] = row, -row
    params = {**toy.params, "text": {**toy.params["text"], "head": jnp.asarray(head)}}
    found = generate(params=params, sampling=sampling, stops=(), chunk=24)
    assert np.median(found.logprobs) < -300, "the vision tokens were not the likeliest"
    assert not np.isin(found.tokens, toy.config.vision_tokens).any()
    assert (found.tokens < toy.config.text.vocab_size).all()
    if sampling == GREEDY:
        np.testing.assert_array_equal(
            found.tokens, generate(sampling=GREEDY, stops=(), chunk=24).tokens
        )


def test_settings_that_do_not_fit_are_refused(toy, generate):
    with pytest.raises(UserError, match="rollout.kv_block=10 must be a multiple"):
        Engine(toy.config, Compute(), (), kv_block=10, check_every=4)
    with pytest.raises(UserError, match="22.*multiple of rollout.check_every=4"):
        generate(max_new_tokens=22)

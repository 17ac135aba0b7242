"""Settings of the config reach what uses them: each changes what is asked of the part it is for."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.items import Item
from spatial_ssrl_jax.eval.heldout import HeldoutEval
from spatial_ssrl_jax.inference.policy import Policy
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.rl.bucketing import BatchShape, Buckets
from spatial_ssrl_jax.rl.grpo import Grpo
from spatial_ssrl_jax.rl.placement import compute_settings
from spatial_ssrl_jax.rl.scorer import Scorer
from spatial_ssrl_jax.rl.stages import stages
from spatial_ssrl_jax.rollout.engine import Rollout
from spatial_ssrl_jax.tasks import TASKS_BY_NAME
from spatial_ssrl_jax.tasks.example import Example
from spatial_ssrl_jax.trainer import context, stage_steps, training
from spatial_ssrl_jax.trainer.benchmark_eval import eval_options
from spatial_ssrl_jax.trainer.best_checkpoint import BestCheckpoint
from tests.helpers.toy_runs import make_config
from tests.rl.conftest import batch_of, make_grpo

BASE = make_config(c.ModelSettings(dtype="float32", attention="xla"))
BUCKETS = Buckets((BatchShape(64, 320),))


def changed(section: str, name: str, value: object) -> c.Config:
    """The config with one setting changed."""
    return replace(BASE, **{section: replace(getattr(BASE, section), **{name: value})})


def grpo_of(config: c.Config, engine: "Recorder | None" = None) -> Grpo:
    """The stage's parts with a config's settings."""
    made = make_grpo(config.grpo, buckets=BUCKETS, engine=engine)
    return replace(made, sampling_settings=config.rollout)


class Recorder:
    """An engine that notes what it is asked for.

    A response is one token: 7 of each group's last sample and of prompts of odd length, else 0.
    """

    shards = 1

    def __init__(self):
        self.calls: list[dict] = []

    def fill(self, params: object) -> None:
        return None

    def generate_batches(self, params, weights, batches, *, longest_prompt, **settings):
        return [
            self.generate(params, weights, [*batch.prompts], prompt_index=batch.index, **settings)
            for batch in batches
        ]

    def generate(self, params, weights, prompts, **settings) -> Rollout:
        lengths = [part.length for part in prompts]
        length = np.concatenate(lengths)
        self.calls.append(
            {"rows": len(length), "prefills": len(lengths), "prompts": prompts, **settings}
        )
        shape = (len(length), settings["group_size"])
        tokens = np.zeros((*shape, settings["max_new_tokens"]), np.int32)
        tokens[:, -1, 0] = 7
        tokens[length % 2 == 1, :, 0] = 7
        ones = np.ones(shape, np.int32)
        return Rollout(tokens, np.zeros(tokens.shape, np.float32), ones, ones > 0)


class Answers:
    """A processor that decodes any response to a right answer in the required format."""

    @staticmethod
    def decode(ids: np.ndarray) -> str:
        return "<think>x</think>\\boxed{1}" if ids[0] == 7 else ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "bfloat16"),
        ("remat", "dots"),
        ("attention_chunk", 8),
        ("vocab_block", 16),
    ],
)
def test_how_programs_compute(name: str, value):
    layout = Layout(make_mesh(c.MeshSettings()))
    before = compute_settings(BASE, layout)
    assert getattr(before, name) != value
    assert compute_settings(changed("model", name, value), layout) == replace(
        before, **{name: value}
    )


@pytest.mark.parametrize(
    ("section", "name", "value", "found"),
    [
        ("grpo", "group_size", 6, lambda call: call["group_size"]),
        ("grpo", "temperature", 0.5, lambda call: call["sampling"].temperature),
        ("rollout", "max_new_tokens", 16, lambda call: call["max_new_tokens"]),
        ("rollout", "batch_prompts", 4, lambda call: call["rows"]),
        ("rollout", "prefill_prompts", 2, lambda call: call["rows"] // call["prefills"]),
    ],
)
def test_what_a_rollout_is_asked_for(toy, section: str, name: str, value, found):
    asked = []
    other = changed(section, name, value)
    for config in (BASE, other):
        engine = Recorder()
        grpo = grpo_of(config, engine)
        batch = batch_of([toy.prompt(i, 6) for i in range(8)], range(8))
        grpo.sample(None, batch, jax.random.key(0))
        asked.append(found(engine.calls[0]))
    assert asked[1] == value != asked[0]


@pytest.mark.parametrize(
    ("section", "name", "value", "found"),
    [
        ("eval", "samples", 3, lambda call: call["group_size"] - 1),
        ("eval", "batch_prompts", 4, lambda call: call["rows"]),
        ("grpo", "temperature", 0.5, lambda call: call["sampling"].temperature),
        ("rollout", "max_new_tokens", 16, lambda call: call["max_new_tokens"]),
    ],
)
def test_what_held_out_images_are_asked_for(toy, section: str, name: str, value, found):
    asked = []
    other = changed(section, name, value)
    for config in (BASE, other):
        engine = Recorder()
        table = heldout(toy, config, {"flip": 5, "shuffle": 2}).measure(
            policy(engine), ["flip"], seed=0
        )
        assert [call["sampling"].greedy_last for call in engine.calls] == [True] * len(engine.calls)
        assert table["flip"]["count"] == 5 and table["shuffle"]["count"] == 2
        asked.append(found(engine.calls[0]))
    assert asked[1] == value != asked[0]


def policy(engine: Recorder) -> Policy:
    return Policy(Answers(), engine, Layout(make_mesh(c.MeshSettings())), None, None)


def heldout(toy, config: c.Config, counts: dict[str, int]) -> HeldoutEval:
    items = {
        task: [Item(example(task), toy.prompt(i, 6 + i), ()) for i in range(count)]
        for task, count in counts.items()
    }
    return HeldoutEval(
        items,
        BUCKETS,
        config.eval,
        config.rollout,
        Scorer(config.reward, {}),
        {"flip": TASKS_BY_NAME["flip"].chance, "shuffle": TASKS_BY_NAME["shuffle"].chance},
        config.grpo.temperature,
    )


def example(task: str, answer: str = "1") -> Example:
    return Example(task, "x", (), "?", answer, "", {}, {})


def test_every_task_is_asked_for_in_one_pass(toy):
    """Seven prompts in a batch of eight; a question's draws follow from its index in its task.

    Each prompt gets its own scores: greedily all are right, sampled those of odd length.
    """
    engine = Recorder()
    evaluation = heldout(toy, BASE, {"flip": 5, "shuffle": 2})
    table = evaluation.measure(policy(engine), ["flip", "shuffle"], seed=0)
    (call,) = engine.calls
    (index,) = call["prompt_index"]
    assert sorted(np.asarray(index).tolist()) == [0, 0, 1, 1, 1, 2, 3, 4]
    assert table["flip"] == {
        "accuracy_greedy": 1.0,
        "accuracy_sampled": pytest.approx(2 / 5),
        "format": pytest.approx(2 / 5),
        "reward": pytest.approx(2 / 5),
        "chance": 1 / 8,
        "count": 5,
    }
    assert table["shuffle"]["accuracy_sampled"] == 0.5 and table["mean"]["count"] == 7
    assert table["mean"]["accuracy_sampled"] == pytest.approx((2 / 5 + 0.5) / 2)


def test_each_kind_of_a_task_has_a_row(toy):
    """Where a task has several; the mean's chance is that of tasks that all know theirs."""
    evaluation = heldout(toy, BASE, {"shuffle": 3, "own": 2})
    shuffled = evaluation.items["shuffle"]
    for number, (kind, answer) in enumerate((("1x3", "0-2-1"), ("2x2", "0-1-3-2"))):
        changed = replace(shuffled[number].example, kind=kind, answer=answer)
        shuffled[number] = replace(shuffled[number], example=changed)
    shuffled[2] = replace(shuffled[2], example=replace(shuffled[1].example))
    table = evaluation.measure(policy(Recorder()), ["shuffle"], seed=0)
    rows = {name: (row["count"], row.get("chance")) for name, row in table.items()}
    assert rows == {
        "shuffle": (3, pytest.approx((1 / 5 + 2 / 23) / 3)),
        "shuffle/1x3": (1, 1 / 5),
        "shuffle/2x2": (2, 1 / 23),
        "own": (2, None),
        "mean": (3, rows["shuffle"][1]),
    }
    both = evaluation.measure(policy(Recorder()), ["shuffle", "own"], seed=0)
    assert "chance" not in both["mean"]


def test_grey_images_are_asked_for_too(toy):
    """With the same questions and draws; nothing else of an image is left."""
    evaluation = heldout(toy, BASE, {"flip": 1})
    (item,) = evaluation.items["flip"]
    evaluation.items["flip"] = [replace(item, prompt=toy.prompt(0, 6, [(1, 4, 6)]))]
    engine = Recorder()
    table = evaluation.measure(policy(engine), ["flip"], seed=0, grey=True)
    real, grey = (np.asarray(call["prompts"][0].vision.patches[0, :24]) for call in engine.calls)
    assert len(np.unique(real)) > 2 and set(np.unique(grey)) == {128}
    first, second = (np.asarray(call["prompt_index"][0]) for call in engine.calls)
    np.testing.assert_array_equal(first, second)
    assert table["flip"]["accuracy_grey"] == table["flip"]["accuracy_sampled"] == 0.0
    assert table["mean"]["accuracy_grey"] == 0.0


def test_a_checkpoints_meta_gives_the_state_back():
    state = context.RunState({"sft": {}}, BestCheckpoint(3, "m", 0.5), {"sft": 2.0}, 40, 5)
    found = context.RunState()
    found.restore(json.loads(json.dumps(state.as_meta())))
    assert found == state
    older = context.RunState()
    older.restore({"heldout": {}, "seconds": {"sft": 1.0}, "best": None})
    assert older == context.RunState(seconds={"sft": 1.0})
    for wrong in ({"best": [1]}, {"best": {"step": 3}}, {"tried": "a"}, {"heldout": 7}):
        with pytest.raises(UserError, match="checkpoint's meta .*: rename the newest step"):
            context.RunState().restore(wrong)


def test_what_a_response_earns(toy):
    """The rule's weight, the task's weight and the division by the group's deviation."""
    items = [Item(example("flip", answer), toy.prompt(0, 6), ()) for answer in ("1", "2")]
    batch = SimpleNamespace(items=items)

    def scored(**changes):
        settings = replace(BASE.grpo, **changes.pop("grpo", {}))
        grpo = replace(
            grpo_of(replace(BASE, grpo=settings)),
            processor=Answers(),
            scorer=Scorer(c.RewardSettings(**changes), {}),
        )
        tokens = np.array([[[7, 0], [0, 0]], [[7, 0], [0, 0]]], np.int32)
        ones = np.ones((2, 2), np.int32)
        return grpo._score(batch, Rollout(tokens, tokens * 0.0, ones, ones > 0))

    plain = scored()
    assert [[r.overall for r in group] for group in plain.rewards] == [
        [pytest.approx(1.0), 0.0],
        [pytest.approx(0.1), 0.0],
    ]
    half = scored(accuracy_weight=0.5)
    assert [group[0].overall for group in half.rewards] == [1.0, 0.5]
    assert scored(task_weights={"flip": 3.0}).rewards[1][0].overall == pytest.approx(0.3)
    np.testing.assert_allclose(plain.advantage, [[0.707, -0.707]] * 2, atol=2e-3)
    unscaled = scored(grpo={"scale_rewards": False})
    np.testing.assert_allclose(unscaled.advantage, [[0.5, -0.5], [0.05, -0.05]], atol=1e-6)
    alone = scored(grpo={"scale_rewards": False, "advantage": "rloo"})
    np.testing.assert_allclose(alone.advantage, [[1.0, -1.0], [0.1, -0.1]], atol=1e-6)


@pytest.mark.parametrize(
    ("section", "name", "value", "option"),
    [
        ("eval", "benchmark_style", "direct", "style"),
        ("eval", "batch_prompts", 4, "batch_prompts"),
        ("rollout", "max_new_tokens", 16, "new_tokens"),
        ("data", "min_pixels", 99, "min_pixels"),
        ("data", "max_pixels", 9999, "max_pixels"),
    ],
)
def test_how_a_benchmark_is_asked(section: str, name: str, value, option: str):
    layout = Layout(make_mesh(c.MeshSettings()))
    before = eval_options(BASE, layout)
    other = changed(section, name, value)
    assert getattr(before, option) != value
    assert eval_options(other, layout) == replace(before, **{option: value})


@pytest.mark.parametrize(
    ("section", "name", "value", "number"),
    [("data", "threads", 3, "threads"), ("data", "workers", 2, "workers")],
)
def test_how_data_are_made(monkeypatch: pytest.MonkeyPatch, section, name, value, number: str):
    asked = []
    monkeypatch.setattr(context, "batches", lambda *_, **settings: asked.append(settings))
    monkeypatch.setattr(context, "items_of", lambda *_: None)
    other = changed(section, name, value)
    for config in (BASE, other):
        components = SimpleNamespace(
            config=config, source=None, split=SimpleNamespace(train=()), processor=None
        )
        context.pipeline(components, stages(config)[1], start=2)
    assert asked[1][number] == value != asked[0][number] and asked[0]["start"] == 2


def test_each_step_has_draws_and_replacements_of_its_own(toy, monkeypatch: pytest.MonkeyPatch):
    """The same prompts, drawn in two steps; every group is flat, so that both resample twice."""
    prompts = batch_of([toy.prompt(i, 6) for i in range(8)], range(8))
    items = tuple(replace(item, example=example("flip", "9")) for item in prompts.items)
    engine, asked = Recorder(), []
    settings = replace(
        BASE.grpo,
        prompts=8,
        steps=4,
        filter_groups=True,
        max_resamples=2,
        kl_coef=0.5,
        kl_schedule="linear",
    )
    config = replace(BASE, seed=3, grpo=settings)
    grpo = replace(grpo_of(config, engine), processor=Answers(), scorer=Scorer(config.reward, {}))

    kl_coefs, counted, updated = [], [], np.ones(8, bool)

    def step(made, state, batch, key, resample, kl_coef):
        assert (made.queue, made.gap) == ("the queue", "the clock")
        kl_coefs.append(kl_coef)
        sampled = grpo.sample(None, batch, key)
        for number in (1, 2):
            resample(number)
        return state, {}, batch, SimpleNamespace(rollout=sampled, updated=updated)

    def stream(_run, seed, *_):
        return seed

    def drawn(items, batch, micro, number, **_):
        assert (batch, micro) == (8, 4)  # a rollout has two updates
        asked.append((items, number))

    monkeypatch.setattr(stage_steps.Grpo, "step", step)
    monkeypatch.setattr(stage_steps, "useful_flops", lambda *args: counted.append(args[-1]) or 0.0)
    monkeypatch.setattr(stage_steps, "items_of", stream)
    monkeypatch.setattr(stage_steps, "batch_at", drawn)
    (_, stage) = stages(config)
    run = SimpleNamespace(
        config=config,
        rollout_prompts=config.rollout.batch_prompts,
        ahead="the queue",
        gap="the clock",
        source=None,
        split=SimpleNamespace(train=()),
        processor=None,
        layout=None,
        compute=SimpleNamespace(attention=None),
        engine=None,
        scorer=None,
        model=SimpleNamespace(config=None),
    )
    make = stage_steps.grpo_step(run, stage, None, None)
    batch = replace(prompts, items=items)
    make(0, None, batch)
    _, metrics, _ = make(1, None, batch)
    assert all(groups is updated for groups in counted) and len(counted) == 2
    assert kl_coefs == [0.5, 0.375] and metrics["kl/coef"] == 0.375
    keys = [jax.random.key_data(call["key"]).tolist() for call in engine.calls]
    assert keys[0] != keys[-1]
    assert [number for _, number in asked] == [0, 1, 2, 3]
    seeds = {seed for seed, _ in asked}
    assert seeds.isdisjoint({2 * config.seed, 2 * config.seed + 1}) and len(seeds) == 1
    assert seeds == {1_000_001 + 2 * config.seed}


def test_checkpoints_are_counted_from_the_stages_start():
    """Three SFT steps, then six of GRPO: every fourth one of a stage, and its last."""
    config = replace(
        BASE,
        sft=replace(BASE.sft, steps=3),
        grpo=replace(BASE.grpo, steps=6),
        checkpoint=replace(BASE.checkpoint, every=4),
    )
    sft, grpo = stages(config)
    run = SimpleNamespace(config=config)
    assert [n for n in range(1, 4) if training._save_due(run, sft, n)] == [3]
    assert [n for n in range(4, 10) if training._save_due(run, grpo, n)] == [7, 9]

"""Settings: overrides of every type, and errors that name the key and what was expected."""

import dataclasses
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.load import load_config, split_overrides, to_dict
from spatial_ssrl_jax.config.schema import Config, DataSettings, RewardSettings
from spatial_ssrl_jax.config.validate import check_settings
from spatial_ssrl_jax.rl.row_shapes import row_shapes
from spatial_ssrl_jax.rl.stages import stages
from spatial_ssrl_jax.tasks import TASKS
from spatial_ssrl_jax.tasks.depth import DepthSettings
from tests.conftest import ROOT

FILE = """
from spatial_ssrl_jax.config.schema import Config
def get_config():
    return Config("test")
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "c.py").write_text(FILE)
    return str(tmp_path / "c.py")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("name", "12", "12"),
        ("seed", "7", 7),
        ("mesh.fsdp", "-1", -1),
        ("grpo.kl_coef", "1e-3", 1e-3),
        ("grpo.temperature", "2", 2.0),
        ("grpo.scale_rewards", "False", False),
        ("model.from_scratch", "true", True),
        ("model.path", "a/b=c", "a/b=c"),
        ("data.prompt_buckets", "(64, 128)", (64, 128)),
        ("data.prompt_buckets", "64,128", (64, 128)),
        ("data.prompt_buckets", "64", (64,)),
        ("sft.freeze", "vision,merger", ("vision", "merger")),
        ("sft.freeze", "('vision',)", ("vision",)),
        ("grpo.freeze", "", ()),
        ("grpo.lora.rank", "8", 8),
        ("grpo.lora.targets", "language.q", ("language.q",)),
        ("tasks.crop.weight", "0.5", 0.5),
        ("tasks.shuffle.kinds.2x2", "3", 3.0),
    ],
)
def test_an_override_of_each_type(path: str, key: str, text: str, value):
    config = load_config(path, [(key, text)])
    plain, before = to_dict(config), to_dict(load_config(path))
    *sections, last = key.split(".")
    node, old = plain, before
    for section in sections:
        node, old = node[section], old[section]
    expected = list(value) if isinstance(value, tuple) else value
    assert node[last] == expected and type(node[last]) is type(expected)
    old[last] = node[last]
    assert plain == before  # and nothing else changed


def test_numbers_where_none_are_named(path: str):
    sizes = {"row_tokens": "99", "row_patches": "32,", "row_responses": "(8,)"}
    grpo = load_config(path, [(f"grpo.{name}", text) for name, text in sizes.items()]).grpo
    assert (grpo.row_tokens, grpo.row_patches, grpo.row_responses) == ((99,), (32,), (8,))


def test_later_overrides_win_and_defaults_are_not_touched(path: str):
    config = load_config(
        path, [("grpo.steps", "3"), ("tasks.flip.weight", "0"), ("grpo.steps", "4")]
    )
    assert config.grpo.steps == 4 and config.tasks["flip"].weight == 0
    assert Config("other").tasks["flip"].weight > 0


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("grpo.stepps", "1", r"unknown config key config\.grpo\.stepps: did you mean steps\?"),
        ("rolout.limit", "1", r"unknown config key config\.rolout\.limit: did you mean rollout\?"),
        ("tasks.flipp.weight", "1", r"did you mean flip\?"),
        ("zzz", "1", r"unknown config key config\.zzz: known here: name, seed, model"),
        ("grpo", "1", r"config\.grpo is a section: set one of steps, prompts"),
        ("tasks", "1", r"config\.tasks is a section: set one of shuffle, flip"),
        ("tasks.flip", "1", r"config\.tasks\.flip is a section: set one of weight"),
        ("seed.x", "1", r"config\.seed\.x goes too deep: config\.seed is a value"),
        ("grpo.steps", "many", r"config\.grpo\.steps=many does not fit: expected int"),
        ("grpo.steps", "1.5", r"expected int"),
        ("grpo.steps", "True", r"expected int"),
        ("grpo.scale_rewards", "1", r"config\.grpo\.scale_rewards=1 does not fit: expected bool"),
        ("grpo.learning_rate", "fast", r"expected float"),
        (
            "data.prompt_buckets",
            "big",
            r"config\.data\.prompt_buckets=big does not fit: expected whole numbers, such as",
        ),
        ("data.prompt_buckets", "1.5", r"expected whole numbers"),
        ("data.prompt_buckets", "()", r"data\.prompt_buckets is empty: give at least one number"),
    ],
)
def test_an_override_that_does_not_fit_is_explained(path: str, key: str, text: str, said: str):
    with pytest.raises(UserError, match=said):
        load_config(path, [(key, text)])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model.dtype": "float16"},
            r"model\.dtype=float16 is unknown: choose one of float32, bfloat16",
        ),
        ({"model.remat": "some"}, r"model\.remat=some is unknown: choose one of none"),
        ({"sft.schedule": "linear"}, r"sft\.schedule=linear is unknown"),
        ({"grpo.schedule": "linear"}, r"grpo\.schedule=linear is unknown"),
        (
            {"grpo.minibatches_per_rollout": "3"},
            r"grpo\.minibatches_per_rollout=3 must divide grpo\.prompts=256",
        ),
        (
            {"grpo.minibatches_per_rollout": "0"},
            r"grpo\.minibatches_per_rollout=0 must be at least 1",
        ),
        (
            {"rollout.batch_prompts": "100"},
            r"rollout\.batch_prompts=100 must divide grpo\.prompts=256",
        ),
        ({"sft.micro_batch_rows": "0"}, r"sft\.micro_batch_rows=0 must be at least 1"),
        ({"grpo.micro_batch_rows": "0"}, r"grpo\.micro_batch_rows=0 must be at least 1"),
        (
            {"sft.row_tokens": "9", "sft.row_patches": "4,8", "sft.row_responses": "8"},
            r"sft\.row_tokens=\(9,\), sft\.row_patches=\(4, 8\) and sft\.row_responses=\(8,\) must",
        ),
        (
            {"sft.row_tokens": "9", "sft.row_patches": "6", "sft.row_responses": "8"},
            r"sft\.row_patches=\(6,\) must be multiples of 4, the patches of a token",
        ),
        (
            {"data.patch_buckets": "8,"},
            r"data\.prompt_buckets=\(1024, 2048, 4096\) and data\.patch_buckets=\(8,\) must have",
        ),
        (
            {"data.patch_buckets": "8,12,18"},
            r"data\.patch_buckets=\(8, 12, 18\) must be multiples of 4",
        ),
        (
            {"grpo.row_responses": "8"},
            r"grpo\.row_tokens=\(\), .*grpo\.row_responses=\(8,\) must have equally many numbers",
        ),
        (
            {
                "grpo.row_tokens": "9," * 4,
                "grpo.row_patches": "4," * 4,
                "grpo.row_responses": "8," * 4,
            },
            r"grpo\.row_tokens=\(9, 9, 9, 9\) has more than 3 sizes of rows",
        ),
        (
            {"sft.row_tokens": "9,9", "sft.row_patches": "4,4", "sft.row_responses": "9,10"},
            r"sft\.row_responses=10 is above sft\.row_tokens=9 of the same size",
        ),
        (
            {"grpo.row_tokens": "0", "grpo.row_patches": "9", "grpo.row_responses": "64"},
            r"grpo\.row_tokens=\(0,\): 0 must be at least 1",
        ),
        (
            {"grpo.row_tokens": "9", "grpo.row_patches": "-1", "grpo.row_responses": "64"},
            r"grpo\.row_patches=\(-1,\): -1 must be at least 0",
        ),
        (
            {"sft.row_tokens": "9,9", "sft.row_patches": "9,9", "sft.row_responses": "0,64"},
            r"sft\.row_responses=\(0, 64\): 0 must be at least 1",
        ),
        ({"rollout.check_every": "3"}, r"rollout\.check_every=3 must divide rollout\.kv_block=256"),
        (
            {"rollout.max_new_tokens": "2050"},
            r"rollout\.check_every=8 must divide rollout\.max_new_tokens=2050",
        ),
        ({"grpo.group_size": "1"}, r"grpo\.group_size=1 must be at least 2"),
        ({"grpo.kl_coef": "-0.1"}, r"grpo\.kl_coef=-0\.1 must be at least 0"),
        ({"grpo.steps": "0"}, r"sft\.steps and grpo\.steps are both 0"),
        ({"grpo.steps": "-1"}, r"grpo\.steps=-1 must be at least 0"),
        ({"data.workers": "-1"}, r"data\.workers=-1 must be at least 0"),
        ({"sft.freeze": "visoin"}, r"sft\.freeze=visoin is unknown: choose one of vision, merger"),
        ({"grpo.freeze": "vision,merger,language"}, r"grpo\.freeze holds every part"),
        ({"grpo.lora.rank": "-1"}, r"grpo\.lora\.rank=-1 must be at least 0"),
        ({"grpo.lora.targets": "q_proj"}, r"grpo\.lora\.targets=q_proj is unknown: choose one of"),
        ({"grpo.lora.rank": "8", "grpo.lora.targets": ""}, r"grpo\.lora\.targets is empty"),
        (
            {"sft.lora.rank": "8", "sft.freeze": "vision"},
            r"sft\.freeze does nothing with sft\.lora\.rank=8",
        ),
        (
            {"grpo.freeze": "vision", "grpo.vision_learning_rate_scale": "0.1"},
            r"vision_learning_rate_scale=0\.1 must be 1 where the vision tower",
        ),
        (
            {"grpo.lora.rank": "8", "grpo.vision_learning_rate_scale": "0.1"},
            r"vision_learning_rate_scale=0\.1 must be 1 where the vision tower",
        ),
        ({"grpo.vision_learning_rate_scale": "0"}, r"rate_scale=0\.0 must be above 0"),
        ({"grpo.dual_clip": "0.5"}, r"grpo\.dual_clip=0\.5 must be above 1, or 0 to turn it off"),
        (
            {"grpo.policy_loss": "cispo"},
            r"grpo\.dual_clip=3\.0 does nothing with grpo\.policy_loss=cispo.*set .*dual_clip=0",
        ),
        ({"grpo.advantage": "rloo"}, r"rloo is not divided .* set grpo\.scale_rewards=False"),
        (
            {"grpo.kl_schedule": "cosine", "grpo.kl_coef": "0"},
            r"grpo\.kl_schedule=cosine does nothing with grpo\.kl_coef=0",
        ),
        (
            {"grpo.importance_level": "sequence"},
            r"grpo\.importance_level=sequence does nothing .*: choose truncate or mask",
        ),
        (
            {"grpo.importance_correction": "mask", "grpo.old_logprobs": "sampler"},
            r"grpo\.importance_correction=mask would count the sampler twice",
        ),
        ({"grpo.filter_high": "0.9"}, r"filter_high do nothing without grpo\.filter_groups"),
        (
            {"grpo.filter_groups": "True", "grpo.filter_low": "1"},
            r"grpo\.filter_low=1\.0 must be below grpo\.filter_high=1\.0",
        ),
        ({"data.max_pixels": "9"}, r"data\.min_pixels=262144 must be at most data\.max_pixels=9"),
        (
            {"sft.steps": "2", "grpo.init_from": "a/b"},
            r"grpo\.init_from takes the place .* set sft\.steps=0",
        ),
        ({"log.report_every": "0"}, r"log\.report_every=0 must be at least 1"),
        ({"checkpoint.every": "0"}, r"checkpoint\.every=0 must be at least 1"),
        ({f"tasks.{t}.weight": "0" for t in Config("").tasks}, r"every task has weight 0"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(path: str, changes: dict, said: str):
    with pytest.raises(UserError, match=said):
        load_config(path, list(changes.items()))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("grpo.learning_rate", -1.0, "at least 0"),
        ("grpo.learning_rate", float("nan"), "at least 0"),
        ("grpo.learning_rate", float("inf"), "at least 0"),
        ("grpo.learning_rate", "1e-6", "a number"),
        ("grpo.steps", -(10**400), "at least 0"),
        ("grpo.steps", 2.5, "a whole number"),
        ("grpo.steps", True, "a whole number"),
        ("optim.max_grad_norm", -1.0, "above 0"),
        ("optim.beta2", 2.0, "at least 0 and below 1"),
        ("grpo.clip_low", -3.0, "above 0 and at most 1"),
        ("grpo.warmup_ratio", 7.0, "at least 0 and at most 1"),
        ("reward.accuracy_weight", 5.0, "at least 0 and at most 1"),
        ("reward.task_weights", {"flip": -1.0}, "at least 0"),
        ("data.prompt_buckets", (), "is empty"),
        ("data.patch_buckets", (8, -1), "at least 0"),
        ("sft.freeze", "vision", "a tuple"),
        ("model.path", None, "text"),
        ("optim.offload", 1, "true or false"),
        ("model", None, "a ModelSettings, not NoneType"),
        ("tasks", [], "a dict of settings, not list"),
        ("tasks", {"flop": 3}, "flop is unknown"),
        ("tasks", {"flip": 3}, "must be a"),
        ("seed", 2**31, f"at least 0 and below {2**31:,}"),
    ],
)
def test_a_value_out_of_range_is_refused(key: str, value: object, said: str):
    section, _, name = key.rpartition(".")
    config = Config("test")
    changed = {name: value}
    if section:
        changed = {section: dataclasses.replace(getattr(config, section), **changed)}
    with pytest.raises(UserError, match=rf"^{re.escape(key)}.*{re.escape(said)}"):
        check_settings(dataclasses.replace(config, **changed))


def test_a_tasks_settings_have_ranges_too():
    tasks = Config("test").tasks
    tasks["flip"] = dataclasses.replace(tasks["flip"], kinds={"vertical": 0.0})
    with pytest.raises(UserError, match=r"tasks\.flip\.kinds are all 0: give one of vertical"):
        check_settings(Config("test", tasks=tasks))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"tasks": {"depth": DepthSettings(kinds={"7_points": 1.0})}},
            "tasks.depth.kinds=7_points",
        ),
        ({"reward": RewardSettings(task_weights={"shufle": 2.0})}, "reward.task_weights=shufle"),
        ({"extra_tasks": (TASKS[0],)}, "extra_tasks has a task named 'shuffle'"),
        ({"extra_tasks": (3,)}, "extra_tasks must hold Tasks, not int"),
    ],
)
def test_names_of_tasks_and_kinds_are_known(changed: dict, said: str):
    with pytest.raises(UserError) as found:
        check_settings(Config("test", **changed))
    assert str(found.value).startswith(said)


def numbers(node: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The annotation of each field that holds numbers."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from numbers(value, f"{prefix}{key}.")
    elif dataclasses.is_dataclass(node):
        for key, hint in typing.get_type_hints(type(node), include_extras=True).items():
            value = getattr(node, key)
            if dataclasses.is_dataclass(value) or key == "tasks":
                yield from numbers(value, f"{prefix}{key}.")
            elif re.search(r"\b(int|float)\b", str(hint)) and "Callable" not in str(hint):
                yield f"{prefix}{key}", hint


def test_every_number_has_a_range():
    found = dict(numbers(Config("test")))
    assert len(found) > 80
    assert [key for key, hint in found.items() if not hasattr(hint, "__metadata__")] == []


def test_a_prompts_bucket_is_a_pair():
    """Of as many patches as its tokens may have, where none are named; in ascending order."""
    assert DataSettings(prompt_buckets=(30, 10)).buckets == ((10, 40), (30, 120))
    named = DataSettings(prompt_buckets=(30, 10), patch_buckets=(64, 8))
    assert named.buckets == ((10, 8), (30, 64))


def test_the_defaults_are_valid():
    check_settings(Config("test"))


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match="config file /nowhere/c.py does not exist"):
        load_config("/nowhere/c.py")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", r"c\.py cannot be run \(AttributeError.*get_config"),
        ("def get_config(:", r"c\.py cannot be run \(SyntaxError"),
        (
            "from spatial_ssrl_jax.config import Config\ndef get_config(): return Config()",
            "TypeError",
        ),
        ("def get_config(): return {}", r"gives dict; it must give a Config"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, said: str):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(UserError, match=said):
        load_config(str(tmp_path / "c.py"))


def test_a_file_that_is_not_python_is_named(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("steps: 1")
    with pytest.raises(UserError, match="c.yaml is no Python file"):
        load_config(str(tmp_path / "c.yaml"))


def test_overrides_are_taken_out_of_a_command_line():
    rest, overrides = split_overrides(
        [
            "--config=c.py",
            "--config.grpo.steps=3",
            "--workdir",
            "w",
            "--config.seed",
            "4",
            "--config.name=a=b",
        ]
    )
    assert rest == ["--config=c.py", "--workdir", "w"]
    assert overrides == [("grpo.steps", "3"), ("seed", "4"), ("name", "a=b")]


def test_an_override_without_a_value_is_refused():
    with pytest.raises(UserError, match=r"--config\.seed has no value"):
        split_overrides(["--config.seed"])


def test_the_config_is_plain_json(path: str):
    config = load_config(path, [("data.prompt_buckets", "1,2")])
    plain = to_dict(config)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["data"]["prompt_buckets"] == [1, 2]
    assert set(plain) == {f.name for f in dataclasses.fields(Config)}


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_shipped_config_loads(file: Path):
    """And its rows hold the largest groups that it allows."""
    config = load_config(str(file))
    assert config.name == file.stem
    assert all(row_shapes(config, stage) for stage in stages(config))


@pytest.mark.parametrize("text", ["raise SystemExit(3)", "exit()", "def get_config(): return f()"])
def test_a_file_that_ends_or_fails_is_named(tmp_path: Path, text: str):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(UserError, match=r"c\.py cannot be run \((SystemExit|NameError).*fix it"):
        load_config(str(tmp_path / "c.py"))


@pytest.mark.parametrize("text", ["(" * 3000, "{[]: 1}", "-" * 9999 + "1", "1" * 5000, "[" * 9999])
def test_an_override_that_cannot_be_parsed_is_refused(path: str, text: str):
    with pytest.raises(UserError, match=r"config\.seed=.* does not fit: expected int"):
        load_config(path, [("seed", text)])

"""A run of seconds: a toy model with the shipped tokenizer, two stages, two tasks."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax.checkpoint.export import export
from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.qwen_vl.lora import LoraSettings
from spatial_ssrl_jax.rl import scorer
from spatial_ssrl_jax.rl.rewards import Reward
from spatial_ssrl_jax.trainer.training import train
from tests.conftest import ROOT, random_params

# Two examples fit in a row. Each of two processes packs four.
ROWS = dict(
    prompts=8,
    row_tokens=(320, 320),
    row_patches=(128, 320),
    row_responses=(64, 64),
    micro_batch_rows=4,
)


def make_config(model: c.ModelSettings, **sections) -> c.Config:
    """A run of two stages over strips of built-in scenes; keywords replace whole sections."""
    base = c.Config(name="toy")
    tasks = {
        name: dataclasses.replace(settings, weight=float(name in ("shuffle", "flip")))
        for name, settings in base.tasks.items()
    }
    tasks["shuffle"] = dataclasses.replace(tasks["shuffle"], kinds={"3x1": 1.0})
    toy = dataclasses.replace(
        base,
        model=model,
        data=c.DataSettings(
            source="scenes:60",
            heldout_fraction=0.1,
            min_pixels=28 * 28,
            max_pixels=56 * 56,
            prompt_buckets=(192,),
            patch_buckets=(320,),
            threads=1,
        ),
        tasks=tasks,
        sft=c.SftSettings(steps=2, learning_rate=1e-3, **ROWS),
        grpo=c.GrpoSettings(
            steps=3,
            prompts=16,
            minibatches_per_rollout=2,
            group_size=3,
            row_tokens=(288, 288),
            row_patches=(128, 320),
            row_responses=(96, 96),
            micro_batch_rows=8,
            learning_rate=1e-3,
        ),
        rollout=c.RolloutSettings(max_new_tokens=32, kv_block=16, check_every=8, batch_prompts=8),
        # A large epsilon: otherwise Adam makes full steps of gradients that are only rounding.
        optim=c.OptimSettings(eps=1e-2),
        checkpoint=c.CheckpointSettings(every=1, keep=2),
        log=c.LogSettings(rollouts_every=2, rollouts_count=2, report_every=2),
        eval=c.EvalSettings(examples=4, samples=2, every=2, batch_prompts=8),
    )
    return dataclasses.replace(toy, **sections)


@pytest.fixture(scope="session")
def taught_config(toy_folder: Path) -> c.Config:
    """SFT of the toy from scratch, long enough to learn some of the format."""
    return make_config(
        c.ModelSettings(str(toy_folder), True, "float32", "none"),
        sft=c.SftSettings(steps=110, learning_rate=1e-2, **ROWS),
        grpo=c.GrpoSettings(steps=0),
        optim=c.OptimSettings(),
        checkpoint=c.CheckpointSettings(every=1000),
        eval=c.EvalSettings(examples=8, samples=4, batch_prompts=8),
    )


@pytest.fixture(scope="session")
def taught(taught_config: c.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run."""
    workdir = tmp_path_factory.mktemp("taught") / "run"
    assert train(taught_config, workdir)
    return workdir


@pytest.fixture(scope="session")
def toy_config(taught: Path) -> Callable[..., c.Config]:
    """Makes a run's config that starts from the taught toy; keywords replace whole sections."""
    model = c.ModelSettings(str(taught / "export"), False, "float32", "none")
    return partial(make_config, model)


@pytest.fixture(scope="session")
def whole(toy_config: Callable[..., c.Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert train(toy_config(), workdir)
    return workdir


@pytest.fixture(scope="session")
def lora_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow model of one layer with the tiny one's tokenizer."""
    tiny = open_model("tiny")
    text = dataclasses.replace(
        tiny.config.text, hidden_size=32, intermediate_size=32, num_hidden_layers=1
    )
    text = dataclasses.replace(text, num_attention_heads=2, num_key_value_heads=1)
    text = dataclasses.replace(text, mrope_section=(2, 3, 3))
    vision = dataclasses.replace(
        tiny.config.vision, depth=1, hidden_size=16, intermediate_size=16, num_heads=1
    )
    vision = dataclasses.replace(vision, out_hidden_size=32, fullatt_block_indexes=(0,))
    config = dataclasses.replace(tiny.config, text=text, vision=vision)
    folder = tmp_path_factory.mktemp("base") / "hf"
    source = dataclasses.replace(tiny, config=config)
    export(source, random_params(config, seed=1), folder, "float32")
    return folder


@pytest.fixture(scope="session")
def lora_config(lora_base: Path) -> c.Config:
    """Two stages of adapters, two steps of two prompts each, no held-out metrics."""
    tiny = c.load_config(str(ROOT / "configs" / "tiny.py"))
    small = {"steps": 2, "prompts": 2, "learning_rate": 0.05}
    groups = {"micro_batch_rows": 2, "group_size": 2, "warmup_ratio": 0.0, "temperature": 0.9}
    return dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, path=str(lora_base), from_scratch=False),
        data=dataclasses.replace(tiny.data, source="scenes:20", heldout_fraction=0.0),
        sft=dataclasses.replace(tiny.sft, **small, micro_batch_rows=1, lora=LoraSettings(2)),
        grpo=dataclasses.replace(tiny.grpo, **small, **groups, lora=LoraSettings(3)),
        rollout=dataclasses.replace(tiny.rollout, batch_prompts=2),
        checkpoint=c.CheckpointSettings(every=1, keep=9),
        log=c.LogSettings(rollouts_every=1, report_every=1),
    )


@contextmanager
def rewarding_length() -> Iterator[None]:
    """Rewards long answers: those of an untrained model earn nothing else.

    All count as right, as the check before a run asks of right ones.
    """

    def by_length(text: str, *_) -> Reward:
        return Reward(overall=len(text) / 100, accuracy=1.0, format=1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "score_response", by_length)
        yield


@pytest.fixture(scope="module")
def reward_by_length() -> Iterator[None]:
    with rewarding_length():
        yield


@pytest.fixture(scope="session")
def lora_run(lora_config: c.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    with rewarding_length():
        assert train(lora_config, workdir)
    return workdir

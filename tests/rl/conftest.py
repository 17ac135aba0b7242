"""A very small model and a mixed batch: prompts and responses of different lengths, images."""

from collections.abc import Sequence

import numpy as np
import optax
import pytest

from spatial_ssrl_jax.config.schema import (
    GrpoSettings,
    MeshSettings,
    RewardSettings,
    RolloutSettings,
)
from spatial_ssrl_jax.data.items import Item
from spatial_ssrl_jax.data.packing import Content, RowShape
from spatial_ssrl_jax.data.pipeline import Batch
from spatial_ssrl_jax.data.processor import Prompt
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig, TextConfig
from spatial_ssrl_jax.qwen_vl.qwen2_5 import (
    MODEL_TYPE,
    Qwen2_5VisionConfig,
    lay_out_patches,
    mrope_positions,
)
from spatial_ssrl_jax.rl.batch import GroupBatch, PackedBatch
from spatial_ssrl_jax.rl.bucketing import BatchShape, Buckets
from spatial_ssrl_jax.rl.grpo import Grpo
from spatial_ssrl_jax.rl.losses import GrpoLoss
from spatial_ssrl_jax.rl.scorer import Scorer
from spatial_ssrl_jax.rl.sft import PackedStep, pack_step
from spatial_ssrl_jax.rl.step_metrics import ScoredRollout
from spatial_ssrl_jax.rollout.engine import Engine, Rollout
from tests.conftest import SMALL_TEXT, SMALL_VISION, random_params
from tests.helpers.groups import Sampled

CONFIG = QwenVLConfig(
    model_type=MODEL_TYPE,
    text=TextConfig(vocab_size=96, **SMALL_TEXT),
    vision=Qwen2_5VisionConfig(**SMALL_VISION),
    tie_word_embeddings=True,
    image_token_id=90,
    video_token_id=91,
    vision_start_token_id=92,
    vision_end_token_id=93,
    bos_token_id=94,
    eos_token_id=95,
)


# Words and images of each prompt of `mixed_batch`.
TEXTS = (5, 11, 7)
GRIDS = ([(1, 4, 6), (1, 10, 4)], [(1, 8, 8)], [])


def make_prompt(rng: np.random.Generator, text: int, grids: list[tuple[int, int, int]]) -> Prompt:
    """Random text and patches, images first."""
    config = CONFIG.vision
    ids = []
    for _, h, w in grids:
        ids += [92, *[90] * (h * w // 4), 93]
    ids = np.array([*ids, *rng.integers(0, 90, text)], np.int32)
    is_vision = ids == 90
    layout = lay_out_patches(config, grids)
    position = mrope_positions(config, is_vision, grids, [None] * len(grids))
    index = np.full(len(ids), -1, np.int32)
    index[is_vision] = layout.merged
    patches = rng.integers(0, 256, (len(layout.source), config.patch_dim), np.uint8)
    return Prompt(
        ids, position, int(position.max()) + 1, index, patches, layout.frame, layout.coords
    )


# Words and images of each example of `examples`, and tokens of its response.
SUPERVISED = (
    (5, [(1, 4, 6), (1, 10, 4)], 3),
    (11, [], 8),
    (7, [(1, 8, 8)], 1),
    (4, [], 5),
    (9, [(1, 2, 2)], 6),
)
# Two examples fit in a row.
SHAPES = (RowShape(Content(56, 256, 14), longest_response=8),)


@pytest.fixture(scope="session")
def examples() -> tuple[Batch, list[np.ndarray]]:
    """Prompts with two, one and no images, and a response to each."""
    rng = np.random.default_rng(1)
    prompts = [make_prompt(rng, text, grids) for text, grids, _ in SUPERVISED]
    responses = [rng.integers(0, 90, n).astype(np.int32) for _, _, n in SUPERVISED]
    batch = Batch(tuple(Item(None, prompt, ()) for prompt in prompts), np.arange(5))
    return batch, responses


def packed(examples: tuple[Batch, list[np.ndarray]], micro_batch_rows: int = 2) -> PackedStep:
    """The examples in rows of `SHAPES`."""
    return pack_step(*examples, SHAPES, micro_batch_rows, CONFIG)


@pytest.fixture(scope="session")
def packed_batch(examples) -> PackedBatch:
    """All examples in one micro-batch."""
    (batch,) = packed(examples, micro_batch_rows=3)
    return batch


@pytest.fixture(scope="session")
def small_params():
    """Weights with random biases and norms, so that a wrong mask or position shows."""
    return random_params(CONFIG, seed=0)


@pytest.fixture(scope="session")
def mixed_prompts() -> list[Prompt]:
    """Two images, one, none."""
    rng = np.random.default_rng(0)
    return [make_prompt(rng, text, grids) for text, grids in zip(TEXTS, GRIDS, strict=True)]


@pytest.fixture(scope="session")
def mixed(mixed_prompts: list[Prompt]) -> Sampled:
    """Three groups of four: two images, one, none; one without variance; full-length ones."""
    rng = np.random.default_rng(0)
    length = np.array([[3, 8, 8, 3], [8, 8, 8, 8], [3, 3, 3, 3]], np.int32)
    tokens = rng.integers(0, 90, (3, 4, 8)).astype(np.int32)
    tokens[np.arange(8) >= length[..., None]] = 0
    advantage = rng.normal(size=(3, 4)).astype(np.float32)
    advantage[1] = 0
    logprobs = rng.normal(-4.5, 0.4, (3, 3, 4, 8)).astype(np.float32)
    weight = rng.uniform(0.5, 1.5, length.shape).astype(np.float32) / length.sum()
    return Sampled(mixed_prompts, tokens, length, weight, advantage, *logprobs)


@pytest.fixture(scope="session")
def mixed_batch(mixed: Sampled) -> GroupBatch:
    """The groups in two rows."""
    return mixed.packed(CONFIG, [[0, 2], [1]])


# GRPO: three prompts of four samples, which reach their limit of eight tokens or end before.
SETTINGS = GrpoSettings(
    prompts=3, minibatches_per_rollout=1, micro_batch_rows=1, group_size=4, kl_coef=0.0
)
ROLLOUT = RolloutSettings(max_new_tokens=8, kv_block=4, check_every=4, batch_prompts=2)
BUCKETS = Buckets((BatchShape(40, 100),))
# Any group has a row; two small ones may share it.
ROW = RowShape(Content(72, 192, 32), longest_response=8)


def make_grpo(
    settings: GrpoSettings,
    shapes: Sequence[RowShape] = (ROW,),
    buckets: Buckets = BUCKETS,
    engine: Engine | None = None,
) -> Grpo:
    """The stage's parts for `CONFIG`, without a processor and a reference."""
    loss = GrpoLoss(CONFIG, Compute(attention_chunk=16, vocab_block=32), settings)
    layout = Layout(make_mesh(MeshSettings()))
    scorer = Scorer(RewardSettings(), {})
    fixed = scorer, engine, loss, optax.sgd(1.0), layout, buckets, tuple(shapes)
    return Grpo(settings, ROLLOUT, *fixed, processor=None, reference=None)


def batch_of(prompts: Sequence[Prompt], index: Sequence[int]) -> Batch:
    """Prompts as a step's batch; each example is its number."""
    items = (Item(f"example {n}", prompt, ()) for n, prompt in enumerate(prompts))
    return Batch(tuple(items), np.array(index, np.int32))


@pytest.fixture(scope="session")
def grpo_step(mixed: Sampled) -> tuple[Batch, ScoredRollout]:
    """The mixed groups as a step; the second prompt has the longest responses."""
    rollout = Rollout(mixed.tokens, mixed.sampled_logprobs, mixed.length, mixed.length < 8)
    return batch_of(mixed.prompts, range(3)), ScoredRollout(rollout, [], [], mixed.advantage)

"""The supervised loss over packed rows equals that of the examples one by one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.lora import LoraSettings
from spatial_ssrl_jax.qwen_vl.model import init_adapters
from spatial_ssrl_jax.qwen_vl.param_tree import merge_params
from spatial_ssrl_jax.rl import row_shapes, sft
from spatial_ssrl_jax.rl.losses import SftLoss
from spatial_ssrl_jax.rl.row_shapes import empty_packed_batch
from tests.helpers.groups import sequence, sequence_logprobs
from tests.rl.conftest import CONFIG, SHAPES, packed
from tests.rl.test_exactness import assert_close

# The programs run for milliseconds and compile for seconds.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
LOSS = jax.jit(
    jax.value_and_grad(SftLoss(CONFIG, Compute(attention_chunk=16, vocab_block=32)), has_aux=True),
    compiler_options=QUICK,
)


@pytest.fixture(scope="module")
def adapted(small_params):
    """The small model with adapters on every layer of both towers that change a lot."""
    targets = LoraSettings(rank=2, alpha=6.0, targets=("language", "vision"))
    adapters = init_adapters(CONFIG, targets, jax.random.key(1))
    shaken = jax.tree.map(
        lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), adapters
    )
    return merge_params(small_params, shaken)


@partial(jax.jit, compiler_options=QUICK)
@jax.value_and_grad
def alone_loss(params, whole, response):
    """The sum of -log p over one response to one prompt: nothing is packed, nothing padded."""
    return -jnp.sum(sequence_logprobs(CONFIG, params, whole, response))


@pytest.fixture(scope="module")
def reference(adapted, examples):
    """The mean over all response tokens of the examples, and its gradient, one after another."""
    batch, responses = examples
    total, gradients = 0.0, jax.tree.map(jnp.zeros_like, adapted)
    for row, response in enumerate(responses):
        whole = sequence(batch.prompts[row], response)
        value, more = alone_loss(adapted, whole, response)
        total += float(value)
        gradients = jax.tree.map(jnp.add, gradients, more)
    count = sum(map(len, responses))
    return total / count, jax.tree.map(lambda g: np.asarray(g) / count, gradients)


@pytest.mark.parametrize("rows", [1, 2])
def test_packed_loss_is_the_one_by_one_loss(adapted, examples, reference, rows: int):
    """Adapters and base alike, in micro-batches of one row, or of two with an empty one."""
    step = packed(examples, micro_batch_rows=rows)
    packed_rows = [row for part in step.micro_batches for row in part.rows]
    assert len(step.micro_batches) == -(-3 // rows)
    assert packed_rows[:3] == [(0, 2), (1, 4), (3,)]
    total, gradients = 0.0, jax.tree.map(jnp.zeros_like, adapted)
    for batch in step:
        (value, sums), more = LOSS(adapted, batch)
        total += float(value)
        assert float(sums["policy/entropy"]) > 0
        gradients = jax.tree.map(jnp.add, gradients, more)
    assert total == pytest.approx(reference[0], rel=1e-5)
    assert_close(gradients, reference[1], 3e-5)


def test_rows_without_any_token_add_nothing(adapted, examples):
    """What a process runs when only another one still has examples."""
    (value, _), gradients = LOSS(adapted, empty_packed_batch(SHAPES[-1], CONFIG.vision))
    assert float(value) == 0
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(gradients))


def test_processes_agree_on_micro_batches(examples, monkeypatch: pytest.MonkeyPatch):
    """Beside a process with four rows this one runs an empty fourth."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    other = np.array([[[4]]])
    monkeypatch.setattr(row_shapes, "all_gather", lambda x: np.concatenate([x, other]))
    monkeypatch.setattr(sft, "all_sum", lambda value: value + 7)
    step = packed(examples, micro_batch_rows=2)
    assert [part.shape for part in step.micro_batches] == [SHAPES[0]] * 4
    assert [part.rows for part in step.micro_batches][3] == ((),)
    assert step.normaliser == 23 + 7
    assert [batch.rows.ids.shape for batch in step] == [(1, 56)] * 4


def test_padding_is_counted_over_all_rows(examples):
    assert packed(examples, micro_batch_rows=2).padded_tokens == 4 * 56

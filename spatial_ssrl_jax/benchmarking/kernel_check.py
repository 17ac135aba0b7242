"""Which attention is right and fastest on the device at hand: what `auto` should be there.

Every kernel that can run on the device is compared with XLA in float32, and is right where its
errors are at most four times those of XLA in bfloat16: log-probabilities and gradients of groups
and of packed rows, whose prompts, responses and rows have odd lengths, and steps of decoding.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spatial_ssrl_jax.benchmarking.synthetic_prompts import synthetic_prompt
from spatial_ssrl_jax.benchmarking.timing import median_seconds
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.text import error_line
from spatial_ssrl_jax.config.schema import MeshSettings
from spatial_ssrl_jax.data.packing import Content, Group, RowShape, fill_rows
from spatial_ssrl_jax.parallel.compiler import set_compiler_flags
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.qwen_vl.compute import XLA, AttentionKernel, Compute
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig, TextConfig
from spatial_ssrl_jax.qwen_vl.inputs import PackedRows
from spatial_ssrl_jax.qwen_vl.kernels import (
    DECODE_KERNELS,
    KERNELS,
    auto_kernels,
    choose_decode_kernel,
    choose_kernel,
    decode_attention,
)
from spatial_ssrl_jax.qwen_vl.model import Params, init_params
from spatial_ssrl_jax.qwen_vl.param_tree import flatten_params
from spatial_ssrl_jax.qwen_vl.qwen2_5 import MODEL_TYPE, Qwen2_5VisionConfig
from spatial_ssrl_jax.rl.logprobs import packed_logprobs

_TOLERANCE = 4.0  # times the errors of XLA in bfloat16
_STEPS = 64  # of decoding in a timed run
# The 3B's widths, with two layers in each tower and a small vocabulary.
_TWO_LAYERS = QwenVLConfig(
    model_type=MODEL_TYPE,
    text=TextConfig(8192, 2048, 11_008, 2, 16, 2, mrope_section=(16, 24, 24)),
    vision=Qwen2_5VisionConfig(2, 1280, 3420, 16, 2048, fullatt_block_indexes=(1,)),
    tie_word_embeddings=True,
    image_token_id=8187,
    video_token_id=8188,
    vision_start_token_id=8189,
    vision_end_token_id=8190,
    bos_token_id=8191,
    eos_token_id=8186,
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is computed.

    Attributes:
      prompts: tokens of each prompt; the last of them is not padded.
      grid: patches along an image's side, one image a prompt.
      group: samples a prompt.
      response: tokens of the longest response.
      slots: tokens of a sample's cache.
    """

    prompts: tuple[int, ...] = (513, 801, 1121)
    grid: int = 36
    group: int = 5
    response: int = 255
    slots: int = 256


@dataclass(frozen=True)
class Measured:
    """A kernel's errors against XLA in float32, and its times.

    Attributes:
      setting: the setting that selects it.
      kernel: its name.
      inputs: `groups`, `rows` or `steps`.
      error: largest of log-probabilities in nats; of a decode step, over the largest value.
      gradient_errors: of each weight's gradient, over its largest value.
      forward_ms, gradients_ms: of a pass, and of one with gradients; a step for `steps`.
      failure: why it did not run.
    """

    setting: str
    kernel: str
    inputs: str
    error: float = float("nan")
    gradient_errors: dict[str, float] = field(default_factory=dict)
    forward_ms: float = float("nan")
    gradients_ms: float = float("nan")
    failure: str = ""

    @property
    def gradient_error(self) -> float:
        """The largest; NaN where there is none."""
        return float(np.max([*self.gradient_errors.values()] or [np.nan]))

    @property
    def ms(self) -> float:
        """What a choice goes by: of a decode step, or of a pass with gradients."""
        return self.forward_ms if self.inputs == "steps" else self.gradients_ms

    def is_right(self, xla: "Measured") -> bool:
        """Whether no error is above what XLA's in bfloat16 allow; NaN, as of a failure, is."""
        typical = statistics.median(xla.gradient_errors.values() or [0.0])
        return self.error <= _TOLERANCE * xla.error and all(
            error <= _TOLERANCE * max(xla.gradient_errors[path], typical)
            for path, error in self.gradient_errors.items()
        )


# (how to compute, weights) -> log-probabilities, those of tokens that do not count 0.
Logprobs = Callable[[Compute, Params], Array]


def verify_kernels(runs: int) -> dict[str, Any]:
    """Measures every kernel on the first device.

    Args:
      runs: timed runs after one that compiles.

    Returns:
      The device, its measurements, and a sentence on each of both settings.
    """
    set_compiler_flags()  # before the first use of the devices
    device = jax.devices()[0]
    mesh = make_mesh(MeshSettings(), [device])
    attention = _available(KERNELS, partial(choose_kernel, dtype="bfloat16", mesh=mesh))
    decode = _available(DECODE_KERNELS, partial(choose_decode_kernel, dtype="bfloat16", mesh=mesh))
    auto, measured = auto_kernels(device, "bfloat16"), []
    if len(attention) > 1:
        params = init_params(_TWO_LAYERS, jax.random.key(0))
        measured += check_attention(_TWO_LAYERS, params, Sizes(), attention, runs)
    if len(decode) > 1:
        measured += check_decode(_TWO_LAYERS.text, Sizes(), decode, runs)
    return {
        "device": device.device_kind,
        "compute_capability": getattr(device, "compute_capability", None),
        "auto": auto._asdict(),
        "kernels": [asdict(row) | {"gradient_error": row.gradient_error} for row in measured],
        "verdicts": [
            verdict("model.attention", auto.attention, measured),
            verdict("rollout.attention", auto.decode, measured),
        ],
    }


def _available(
    names: Sequence[str], choose: Callable[..., AttentionKernel]
) -> list[AttentionKernel]:
    """The kernels that the device can run."""
    found = []
    for name in names:
        try:
            found.append(choose(name))
        except UserError:
            continue
    return found


def check_attention(
    config: QwenVLConfig,
    params: Params,
    sizes: Sizes,
    kernels: Sequence[AttentionKernel],
    runs: int,
) -> list[Measured]:
    """Measures kernels of attention over many tokens in bfloat16.

    Args:
      config, params: a model of few layers, float32.
      sizes: of what it computes.
      kernels: the first is `xla`.
      runs: timed runs.
    """
    found = []
    for inputs in ("groups", "rows"):
        logprobs = _logprobs(config, sizes, together=inputs == "rows")
        with jax.default_matmul_precision("highest"):
            exact = jax.device_get(_with_gradients(logprobs, Compute("float32"))(params))
        for kernel in kernels:
            compute = Compute("bfloat16", attention=kernel)
            row = partial(Measured, "model.attention", kernel.name, inputs)
            try:
                forward = jax.jit(partial(logprobs, compute))
                backward = _with_gradients(logprobs, compute)
                ours = jax.device_get(backward(params))
                found.append(
                    row(
                        float(np.max(np.abs(ours[0] - exact[0]))),
                        _relative_errors(ours[1], exact[1]),
                        _milliseconds(partial(forward, params), runs),
                        _milliseconds(partial(backward, params), runs),
                    )
                )
            except Exception as error:  # whatever a library says where it cannot run
                found.append(row(failure=error_line(error)))
    return found


def check_decode(
    config: TextConfig, sizes: Sizes, kernels: Sequence[AttentionKernel], runs: int
) -> list[Measured]:
    """Measures kernels of a decode step in bfloat16; as `check_attention`."""
    cursors = sorted({0, 1, sizes.slots // 2 - 1, sizes.slots // 2, sizes.slots - 1})
    exact = [_decode_step(config, sizes, XLA, jnp.float32, cursor)() for cursor in cursors]
    found = []
    for kernel in kernels:
        row = partial(Measured, "rollout.attention", kernel.name, "steps")
        try:
            steps = [_decode_step(config, sizes, kernel, jnp.bfloat16, c) for c in cursors]
            errors = [
                _relative_error(ours, reference)
                for step, expected in zip(steps, exact, strict=True)
                for ours, reference in zip(step(), expected, strict=True)
            ]
            loop = _decode_step(config, sizes, kernel, jnp.bfloat16, sizes.slots // 2, _STEPS)
            forward = _milliseconds(loop, runs) / _STEPS
            found.append(row(float(np.max(errors)), forward_ms=forward))
        except Exception as error:  # as above
            found.append(row(failure=error_line(error)))
    return found


def verdict(setting: str, auto: str, measured: Sequence[Measured]) -> str:
    """Which kernel is right and fastest over all inputs, and whether `auto` is it."""
    rows = [row for row in measured if row.setting == setting]
    names = list(dict.fromkeys(row.kernel for row in rows))
    if not names:
        return (
            f"{setting}: this device has only xla, so there is nothing to choose: auto is {auto}."
        )
    xla = {row.inputs: row for row in rows if row.kernel == "xla"}
    wrong = {row.kernel for row in rows if not row.is_right(xla[row.inputs])} - {"xla"}
    times = {name: sum(r.ms for r in rows if r.kernel == name) for name in names}
    best = min((name for name in names if name not in wrong), key=times.__getitem__)
    refused = f"; {', '.join(sorted(wrong))} failed or gave wrong numbers" if wrong else ""
    if best == auto:
        return f"{setting}: auto is right, {best} is the fastest that gives right numbers{refused}."
    return (
        f"{setting}: auto should be {best} here and is {auto}{refused}: set {setting}={best}, or "
        "AUTO_ON_GPUS in qwen_vl/kernels.py."
    )


def kernel_lines(found: dict[str, Any]) -> list[str]:
    """The measurements as a table, and the sentences."""
    lines = [f"{found['device']}, compute capability {found['compute_capability'] or 'none'}"]
    if found["kernels"]:
        head = ("setting", "kernel", "inputs", "error", "gradients", "forward ms", "with grad. ms")
        lines.append("{:<18} {:<7} {:<7} {:>9} {:>10} {:>11} {:>13}".format(*head))
    for row in found["kernels"]:
        lead = f"{row['setting']:<18} {row['kernel']:<7} {row['inputs']:<7} "
        numbers = (
            f"{row['error']:>9.2e} {row['gradient_error']:>10.2e} {row['forward_ms']:>11.3f} "
            f"{row['gradients_ms']:>13.3f}"
        )
        lines.append(lead + (row["failure"] or numbers.replace("nan", "  -")))
    return lines + found["verdicts"]


def _groups(config: QwenVLConfig, sizes: Sizes) -> list[Group]:
    """Prompts with random responses of 1 to the most tokens."""
    rng, grid, most = np.random.default_rng(1), (1, sizes.grid, sizes.grid), sizes.response
    lengths = rng.integers(1, most + 1, (len(sizes.prompts), sizes.group))
    lengths.flat[:2] = 1, most
    vocabulary = config.text.vocab_size // 2
    return [
        Group(
            synthetic_prompt(config, tokens, grid),
            [rng.integers(0, vocabulary, n).astype(np.int32) for n in of_prompt],
        )
        for tokens, of_prompt in zip(sizes.prompts, lengths, strict=True)
    ]


def _logprobs(config: QwenVLConfig, sizes: Sizes, together: bool) -> Logprobs:
    """Log-probabilities of groups packed together in a row, or each in a row of its own."""
    groups = _groups(config, sizes)
    numbers = [*range(len(groups))]
    contents = np.array([group.content for group in groups])
    rows = [numbers] if together else [[number] for number in numbers]
    tokens, patches, responses = (
        contents.sum(axis=0) if together else contents.max(axis=0)
    ).tolist()
    capacity = Content(tokens // 2 * 2 + 3, patches, responses)  # odd, with a little padding
    packed, _ = fill_rows(groups, rows, RowShape(capacity, sizes.response), config.vision)
    on_device: PackedRows[Array] = jax.device_put(packed)

    def logprobs(compute: Compute, params: Params) -> Array:
        found, _ = packed_logprobs(config, compute, params, on_device, 1.0)
        return found * on_device.mask

    return logprobs


def _with_gradients(
    logprobs: Logprobs, compute: Compute
) -> Callable[[Params], tuple[Array, Params]]:
    """A program of log-probabilities, and gradients of their sum by random weights."""

    def loss(params: Params) -> tuple[Array, Array]:
        found = logprobs(compute, params)
        weight = np.random.default_rng(2).normal(size=found.shape).astype(np.float32)
        return jnp.sum(found * weight), found

    program = jax.jit(jax.grad(loss, has_aux=True))

    def run(params: Params) -> tuple[Array, Params]:
        gradients, found = program(params)
        return found, gradients

    return run


def _decode_step(
    config: TextConfig,
    sizes: Sizes,
    kernel: AttentionKernel,
    dtype: Any,
    cursor: int,
    steps: int = 1,
) -> Callable[[], list[Array]]:
    """Runs `steps` decode steps at a cursor; gives results and the caches, in every `dtype` of
    the same numbers."""
    batch, heads, size = len(sizes.prompts), config.num_key_value_heads, config.head_dim
    packed = config.num_attention_heads // heads + 2
    rng, prompt = np.random.default_rng(3), max(sizes.prompts)

    def drawn(*shape: int) -> Array:
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16).astype(dtype)

    qkv = drawn(batch, sizes.group, heads, packed, size)
    angle = jnp.asarray(rng.uniform(0, 6.28, (batch, size // 2)), jnp.float32)
    prefix = drawn(batch, heads, prompt, size), drawn(batch, heads, prompt, size)
    own = tuple(drawn(batch, sizes.group, heads, sizes.slots, size) for _ in range(2))
    valid = jnp.arange(prompt) < jnp.array(sizes.prompts)[:, None]

    @jax.jit
    def run(qkv: Array, own: tuple[Array, Array], cursor: Array) -> tuple[Array, Any]:
        rotary = (jnp.cos(angle), jnp.sin(angle))

        def step(_: int, carry: tuple[Array, Any]) -> tuple[Array, Any]:
            qkv, own = carry
            out, own = decode_attention(qkv, rotary, prefix, valid, own, cursor, kernel=kernel)
            if steps > 1:  # so that each waits for the one before
                qkv = qkv + 0 * out.reshape(*qkv.shape[:3], -1, size).sum(3, keepdims=True)
            return (qkv, own) if steps > 1 else (out, own)

        if steps == 1:
            return step(0, (qkv, own))
        return jax.lax.fori_loop(0, steps, step, (qkv, own))

    return lambda: jax.tree.leaves(run(qkv, own, jnp.int32(cursor)))


def _relative_errors(found: Params, expected: Params) -> dict[str, float]:
    """Of each weight's gradient; those that are zero in both are left out."""
    ours, reference = flatten_params(found), flatten_params(expected)
    return {
        path: _relative_error(ours[path], reference[path])
        for path in reference
        if np.any(reference[path]) or np.any(ours[path])
    }


def _relative_error(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _milliseconds(run: Callable[[], Any], runs: int) -> float:
    return 1000 * median_seconds(lambda: jax.block_until_ready(run()), runs)

"""Fused attention equals plain XLA's, gradients too, and compiles for a TPU that is not there."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config, MeshSettings, ModelSettings, RolloutSettings
from spatial_ssrl_jax.data.batching import pad_prompts
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.perf.flops import program_flops
from spatial_ssrl_jax.planning.topology import open_topology
from spatial_ssrl_jax.qwen_vl import kernels, splash
from spatial_ssrl_jax.qwen_vl import model as qwen
from spatial_ssrl_jax.qwen_vl.attention import GroupLimits, Visible, attend_block
from spatial_ssrl_jax.qwen_vl.compute import XLA, AttentionKernel, Compute, Remat
from spatial_ssrl_jax.qwen_vl.decode_kernel import attend_decode
from spatial_ssrl_jax.qwen_vl.kernels import decode_attention, local_attention, self_attention
from spatial_ssrl_jax.qwen_vl.layers import REMAT_POLICIES
from spatial_ssrl_jax.rl.placement import compute_settings
from tests.helpers.groups import pack_groups
from tests.helpers.processes import start_all

SPLASH = AttentionKernel("splash", interpret=True)  # the kernel itself, without a TPU
TRITON = AttentionKernel("triton", interpret=True)  # likewise, without a GPU
# The programs run for milliseconds and compile for seconds.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def drawn(length: int, heads: int, keys: int, size: int) -> tuple[Array, Array, Array]:
    """Queries, keys and values of two rows."""
    rng = np.random.default_rng(0)
    shapes = ((2, length, heads, size), (2, keys, length, size), (2, keys, length, size))
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def segments(length: int) -> Array:
    """Segments of three examples and padding in one row, of one example in the other."""
    row = np.repeat([0, 1, 2, -1], [length // 2, length // 5, length // 5, length])[:length]
    return jnp.array([row, np.zeros(length, int)])


# Tokens of each prompt and of its responses, in two rows.
GROUPS = (((50, (20, 3, 40)), (100, (7,)), (120, (30, 1, 1, 60))), ((101, ()), (33, (200, 5))))
LENGTH, LIMITS = 500, GroupLimits(response=200, group=300)


def groups(alignment: int, length: int = LENGTH) -> tuple[Array, Array]:
    """Segments and responses of `GROUPS`, with first responses at multiples of `alignment`."""
    segment, response = np.full((2, length), -1), np.zeros((2, length), int)
    for row, members in enumerate(GROUPS):
        at = 0
        for number, (prompt, responses) in enumerate(members):
            segment[row, at : at + prompt] = number
            at = -(-(at + prompt) // alignment) * alignment
            for sample, tokens in enumerate(responses, 1):
                segment[row, at : at + tokens] = number
                response[row, at : at + tokens] = sample
                at += tokens
        assert at <= length
    return jnp.array(segment), jnp.array(response)


def seen_in_groups(segment: Array, response: Array) -> Array:
    """[B, T, T] bool, by the definition."""
    order = jnp.arange(segment.shape[1])
    same = (segment[:, :, None] == segment[:, None]) & (segment[:, None] >= 0)
    own = (response[:, None] == 0) | (response[:, None] == response[:, :, None])
    return same & own & (order[:, None] >= order)


def assert_alike(ours, reference, arrays: tuple[Array, ...], counts_BT: Array) -> None:
    """Equal results and gradients where tokens count."""
    weight = np.random.default_rng(1).normal(size=arrays[0].shape) * counts_BT[:, :, None, None]

    def value(function):
        def loss(*arrays):
            out = function(*arrays)
            return jnp.sum(out * weight), out

        run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True), compiler_options=QUICK)
        (_, out), gradient = run(*arrays)
        return out * counts_BT[:, :, None, None], *gradient

    for name, a, b in zip(("out", "q", "k", "v"), value(ours), value(reference), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max(), name


def test_splash_is_xlas_attention_in_the_vision_tower():
    """200 patches are padded to two blocks; images end inside of blocks, with gaps in them."""
    segment = jnp.where(jnp.arange(200) % 7 == 6, -1, segments(200))
    visible = Visible.in_segments(segment, causal=False)
    functions = [
        partial(self_attention, visible=visible, compute=Compute(attention=k), causal=False)
        for k in (SPLASH, XLA)
    ]
    assert_alike(*functions, drawn(200, 2, 2, 80), segment >= 0)


def test_splash_is_xlas_attention_over_prompts():
    segment = jnp.where(jnp.arange(200) < jnp.array([[200], [90]]), 0, -1)
    visible = Visible.in_segments(segment, causal=True)
    functions = [
        partial(self_attention, visible=visible, compute=Compute(attention=k), causal=True)
        for k in (SPLASH, XLA)
    ]
    assert_alike(*functions, drawn(200, 4, 2, 128), segment >= 0)


@pytest.mark.parametrize("alignment", [1, 16])
def test_splash_is_a_groups_attention(monkeypatch: pytest.MonkeyPatch, alignment: int):
    """With so many bits that an index of the row has them all, and with fewer."""
    if alignment > 1:
        monkeypatch.setattr(splash, "_BITS", 2 * 9 + 8 - 4)
    assert splash.response_alignment(LENGTH, LIMITS.response) == alignment
    segment, response = groups(alignment)
    visible = Visible.in_groups(segment, response)
    exact = partial(attend_block, seen_BQS=seen_in_groups(segment, response))
    attention = partial(
        self_attention, visible=visible, compute=Compute(attention=SPLASH), causal=True
    )
    assert_alike(partial(attention, limits=LIMITS), exact, drawn(LENGTH, 4, 2, 32), segment >= 0)


@pytest.mark.parametrize("chunk", [64, 100, 999])
def test_xlas_attention_in_chunks_is_that_of_all_keys(chunk: int):
    """Each chunk takes a range of keys that has all that its queries see."""
    segment, response = groups(1)
    compute = Compute(attention_chunk=chunk)
    exact = partial(attend_block, seen_BQS=seen_in_groups(segment, response))
    visible = Visible.in_groups(segment, response)
    attention = partial(self_attention, visible=visible, compute=compute, causal=True)
    arrays = drawn(LENGTH, 4, 2, 16)
    assert_alike(partial(attention, limits=LIMITS), exact, arrays, segment >= 0)


# Segments of at most eight tokens, of which some begin and end inside of blocks; padding last.
SHORT = ([8, 8, 3, 8, 1, 8, 8, 8, 5, 8, 7, 8, 2, 8], [5, 8, 8, 8, 8], [4])


@pytest.mark.parametrize("chunk", [8, 24, 999])
@pytest.mark.parametrize("lengths", SHORT, ids=("long", "medium", "one block"))
def test_short_segments_see_themselves(lengths: list[int], chunk: int):
    """Whichever blocks they lie in, and whichever chunks these are in."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    padded = np.pad(row, (0, 4 if len(lengths) > 1 else 0), constant_values=-1)
    segment = jnp.array([padded, np.where(padded > 2, -1, padded)])
    q, k, v = drawn(len(padded), 4, 4, 16)
    same = (segment[:, :, None] == segment[:, None]) & (segment >= 0)[:, None]

    def local(q: Array, k: Array, v: Array) -> Array:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        return local_attention(q, k, v, segment, 8, Compute(attention_chunk=chunk))

    assert_alike(local, partial(attend_block, seen_BQS=same), (q, k, v), segment >= 0)


def test_which_tokens_a_group_sees():
    """A prompt of two with responses of two and one, padding, and a prompt of one with one."""
    segment = jnp.array([[0, 0, 0, 0, 0, -1, 1, 1, -1]])
    response = jnp.array([[0, 0, 1, 1, 2, 0, 0, 1, 0]])
    rows = [
        "100000000", "110000000", "111000000", "111100000", "110010000", "", "000000100",
        "000000110", "",
    ]  # fmt: skip
    seen = Visible.in_groups(segment, response).to(jnp.arange(9), segment >= 0)
    found = ["".join(map(str, row.astype(int))) for row in np.asarray(seen[0])]
    assert [row for row, want in zip(found, rows, strict=True) if want] == [r for r in rows if r]
    np.testing.assert_array_equal(
        np.asarray(seen)[segment >= 0], seen_in_groups(segment, response)[segment >= 0]
    )


def test_queries_know_what_they_see():
    """A query's integer gives its keys, at the end of a row whose tokens need all bits too."""
    length = 512
    segment, response = groups(4, length)
    segment = segment.at[1, 400:].set(2)  # a prompt up to the end of the row
    bits = splash.QueryBits(index=9, offset=8, alignment=4)
    visible = Visible.in_groups(segment, response)
    found = bits.sees(bits.pack(visible)[:, :, None], jnp.arange(length))
    same = (segment[:, :, None] == segment[:, None]) & (segment[:, None] >= 0)
    held = np.asarray(segment >= 0)
    expected = seen_in_groups(segment, response)
    np.testing.assert_array_equal(np.asarray(found & same)[held], np.asarray(expected)[held])


def pretend_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets programs with cuDNN's operations be traced; only a GPU can compile them."""
    library = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{library}.check_cudnn_version", lambda: 91_000)


@pytest.mark.parametrize("length", [100, 101])
@pytest.mark.parametrize("chunk", [999, 35])
def test_cudnn_trains_on_any_lengths(monkeypatch: pytest.MonkeyPatch, length: int, chunk: int):
    pretend_cudnn(monkeypatch)
    arrays = [x.astype(jnp.bfloat16) for x in drawn(length, 4, 2, 32)]
    visible = Visible.in_segments(segments(length), causal=True)
    compute = Compute(attention=AttentionKernel("cudnn"), attention_chunk=chunk)

    def loss(*arrays: Array) -> Array:
        return self_attention(*arrays, visible, compute, causal=True, limits=LIMITS).sum()

    found = jax.eval_shape(jax.grad(loss, (0, 1, 2)), *arrays)
    assert [x.shape for x in found] == [x.shape for x in arrays]


def test_cudnns_arguments_mean_the_same(monkeypatch: pytest.MonkeyPatch):
    """The library's call with its own XLA in cuDNN's place, which needs a GPU."""
    called = []

    def stand_in(*args, implementation: str, mask: Array | None, **more):
        called.append((implementation, mask is None))
        assert [x.shape[1] % 2 for x in args] == [0, 0, 0]  # others are refused in training
        # The softmax of a query without any key is not defined.
        assert mask is None or isinstance(mask, jax.core.Tracer) or mask.any(axis=-1).all()
        more["mask"] = mask
        return library(*args, implementation="xla", **more)

    library = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    length, cudnn = 51, AttentionKernel("cudnn")
    packed = segments(length)
    prompts = jnp.where(jnp.arange(length) < jnp.array([[51], [20]]), 0, -1)
    for segment, causal, limits in (
        (packed, True, LIMITS),
        (packed, False, None),
        (prompts, True, None),
    ):
        functions = [
            partial(
                self_attention,
                visible=Visible.in_segments(segment, causal=causal),
                compute=Compute(attention=kernel, attention_chunk=chunk),
                causal=causal,
                limits=limits,
            )
            for kernel, chunk in ((cudnn, 21), (XLA, 999))
        ]
        assert_alike(*functions, drawn(length, 4, 2, 16), segment >= 0)
    # Only prompts alone, which are causal, have no mask.
    assert {no_mask for _, no_mask in called} == {False, True} and called[-1][1]
    assert {name for name, _ in called} == {"cudnn"}


@pytest.mark.parametrize(
    "kernel", [AttentionKernel("cudnn"), SPLASH], ids=lambda kernel: kernel.name
)
@pytest.mark.parametrize(("remat", "kept"), [("dots", True), ("full", False)])
def test_dots_keep_the_results_of_fused_attention(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kernel: AttentionKernel,
    remat: Remat,
    kept: bool,
):
    """Its results, and the sums of its softmax in float32: else all of it would be recomputed.

    cuDNN's operation is traced and not compiled, which needs a GPU.
    """
    pretend_cudnn(monkeypatch)
    q, keys = jnp.ones((1, 128, 4, 64), jnp.bfloat16), jnp.ones((1, 2, 128, 64), jnp.bfloat16)
    visible = Visible.in_segments(jnp.zeros((1, 128), jnp.int32), causal=True)

    @partial(jax.checkpoint, policy=REMAT_POLICIES[remat])
    def layer(q: Array) -> Array:
        compute = Compute(attention=kernel)
        out = self_attention(2 * q, keys, keys, visible, compute, causal=True, limits=LIMITS)
        return jnp.sin(out)

    jax.ad_checkpoint.print_saved_residuals(lambda q: layer(q).sum(), q)
    text = capsys.readouterr().out
    assert ("f32[1,4,128] output" in text) is kept
    assert ("bf16[1,128,4,64] output" in text or "bf16[1,4,128,64] output" in text) is kept


def test_every_remat_has_a_policy():
    assert set(REMAT_POLICIES) == set(get_args(Remat))


def decode_step(group: int) -> Callable[[AttentionKernel, int], list[Array]]:
    """Runs a decode step's attention by a kernel at a cursor; its results as leaves.

    Prompts and slots end inside of blocks; a key/value head serves seven query heads.
    """
    rng = np.random.default_rng(0)
    batch, keys, size, prompt, slots = 2, 2, 16, 100, 72

    def drawn(*shape: int) -> Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    qkv, rotary = drawn(batch, group, keys, 7 + 2, size), drawn(2, batch, size // 2)
    prefix, own = drawn(2, batch, keys, prompt, size), drawn(2, batch, group, keys, slots, size)
    valid = jnp.arange(prompt) < jnp.array([[100], [37]])

    @partial(jax.jit, static_argnums=0)
    def run(kernel: AttentionKernel, cursor: Array) -> tuple[Array, tuple[Array, Array]]:
        args = (qkv, tuple(rotary), tuple(prefix), valid, tuple(own), cursor)
        return decode_attention(*args, kernel=kernel)

    return lambda kernel, cursor: jax.tree.leaves(run(kernel, jnp.int32(cursor)))


@pytest.mark.parametrize(("cursor", "group"), [(0, 3), (1, 3), (64, 3), (71, 3), (70, 11)])
def test_the_decode_kernel_is_xlas(cursor: int, group: int):
    """A program takes at most nine samples."""
    run = decode_step(group)
    for ours, reference in zip(run(TRITON, cursor), run(XLA, cursor), strict=True):
        assert np.abs(ours - reference).max() <= 1e-5 * np.abs(reference).max()


def test_the_whole_model_may_run_on_splash(toy):
    prompts = [toy.prompt(0, 20, [(1, 4, 6), (1, 2, 10)]), toy.prompt(1, 40)]
    batch = pad_prompts(prompts, 64, 100)
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 600, (2, 2, 8)).astype(np.int32)
    rows, _ = pack_groups(toy.config, prompts, tokens, np.array([[8, 3], [5, 8]]), [[0, 1], [1]])
    weight = rng.normal(size=(*rows.place.shape, 1)) * (rows.place >= 0)[..., None]

    @partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    def run(compute: Compute, params):
        def loss(params):
            model = qwen.bind(toy.config, params)
            hidden = qwen.packed_hidden(toy.config, model, rows, compute)
            return jnp.sum(hidden * weight), hidden * (weight != 0)

        (_, hidden), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        model = qwen.bind(toy.config, params)
        return hidden, gradient, qwen.prefill(toy.config, model, batch, compute)[0]

    ours, reference = (run(Compute(attention=k), toy.params) for k in (SPLASH, XLA))
    paths = jax.tree_util.tree_leaves_with_path(reference)
    for (path, b), a in zip(paths, jax.tree.leaves(ours), strict=True):
        assert np.abs(a - b).max() <= 2e-5 * np.abs(b).max(), jax.tree_util.keystr(path)


def test_blocks_that_nothing_sees_are_not_in_the_lists():
    """A prompt and two responses of a block each, padding, and another group of two blocks."""
    segment = jnp.repeat(jnp.array([[0, 0, 0, -1, 1, 1]]), 128, axis=1)
    response = jnp.repeat(jnp.array([[0, 1, 2, 0, 0, 1]]), 128, axis=1)
    tiles = splash.visible_blocks(Visible.in_groups(segment, response), 128)
    expected = ["100000", "110000", "101000", "000100", "000010", "000011"]
    assert ["".join(map(str, row.astype(int))) for row in np.asarray(tiles[0])] == expected


def test_flops_of_listed_blocks_are_those_of_half_a_group():
    """Of groups of 256 tokens in a row of 768: two blocks of 256 for each of three."""
    q, k, v = drawn(768, 1, 1, 128)
    visible = Visible.in_segments(jnp.zeros((2, 768), jnp.int32), causal=True)
    compute, limits = Compute(attention=SPLASH), GroupLimits(response=64, group=256)
    attention = partial(self_attention, compute=compute, causal=True, limits=limits)
    done = program_flops(jax.jit(lambda q, v: attention(q, k, v, visible)), q, v)
    assert done == 2 * 5 * 2 * (2 * 256 * 256 * 128)  # two rows, two matmuls, 3 * 3 // 2 blocks up


def run_sharded() -> None:
    """Prints the error of kernels on a mesh of eight devices against XLA on one, gradients too."""
    mesh = make_mesh(MeshSettings(fsdp=2, tensor=4))
    arrays, order = drawn(90, 8, 2, 16), jnp.arange(90)
    segment = jnp.stack((order // 45, order // 30))
    response = jnp.maximum(order % jnp.array([[45], [30]]) - 10, 0) // 15
    visible = Visible.in_groups(segment, response)
    limits = GroupLimits(response=20, group=45)

    def run(compute: Compute):
        def loss(q: Array, k: Array, v: Array):
            out = self_attention(q, k, v, visible, compute, causal=True, limits=limits)
            return jnp.sum(out**2), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arrays)

    rows = Layout(mesh).batch_sharding()
    on_mesh = (
        Compute(attention=replace(SPLASH, mesh=mesh), batch_sharding=rows),
        Compute(attention=AttentionKernel(mesh=mesh), attention_chunk=32, batch_sharding=rows),
    )
    ours = [x for compute in on_mesh for x in jax.tree.leaves(run(compute))]
    reference = 2 * jax.tree.leaves(run(Compute()))
    step, wide = (
        decode_step(3),
        make_mesh(MeshSettings(data=2, fsdp=1, tensor=2), jax.devices()[:4]),
    )
    for devices in (mesh, wide):
        ours += step(replace(TRITON, mesh=devices), 70)
        reference += step(XLA, 70)
    pairs = zip(ours, reference, strict=True)
    print(max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs))


def test_kernels_are_sharded_over_rows_and_heads():
    """Two rows and eight heads on eight devices: two key heads serve four shards, or two."""
    command = "from tests.qwen_vl.test_kernels import run_sharded; run_sharded()"
    (process,) = start_all(["-c", command], 1, devices=8)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    assert float(out) < 1e-5


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("part", ["group", "vision"])
def test_splash_compiles_for_a_tpu(part: str):
    """At the 3B's heads, gradients too, sharded over four chips."""
    layout = Layout(make_mesh(MeshSettings(fsdp=2, tensor=2), open_topology("v5e:2x2").devices))
    kernel = AttentionKernel("splash", layout.mesh)
    length, heads, keys, size = (1536, 16, 2, 128) if part == "group" else (2048, 16, 16, 80)
    limits, compute = GroupLimits(response=256, group=800), Compute(attention=kernel)

    def loss(q, k, v, segment, response):
        if part == "group":
            visible = Visible.in_groups(segment, response)
            out = self_attention(q, k, v, visible, compute, causal=True, limits=limits)
        else:
            visible = Visible.in_segments(segment, causal=False)
            out = self_attention(q, k, v, visible, compute, causal=False)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    shapes = [(2, length, heads, size), (2, keys, length, size), (2, keys, length, size)]
    place = layout.replicated()
    args = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=place) for s in shapes]
    args += [jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=place)] * 2
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 3


@pytest.mark.parametrize(
    ("setting", "name", "dtype", "device", "message"),
    [
        (
            "model",
            "splash",
            "bfloat16",
            ("gpu", "9.0"),
            "runs only on TPUs, and this device is a g",
        ),
        (
            "model",
            "cudnn",
            "bfloat16",
            ("tpu", None),
            "runs only on NVIDIA GPUs, and this device is a",
        ),
        ("model", "cudnn", "float32", ("gpu", "9.0"), "computes only in bfloat16"),
        ("model", "cudnn", "bfloat16", ("gpu", "7.5"), "needs an NVIDIA GPU of compute capability"),
        ("model", "cudnn", "bfloat16", ("gpu", "8.0"), None),
        ("model", "splash", "float32", ("tpu", None), None),
        ("model", "xla", "float32", ("cpu", None), None),
        (
            "rollout",
            "triton",
            "bfloat16",
            ("cpu", None),
            "runs only on NVIDIA GPUs, and this device is a c",
        ),
        ("rollout", "triton", "bfloat16", ("gpu", None), "needs an NVIDIA GPU of compute"),
        ("rollout", "triton", "bfloat16", ("gpu", "8.9"), None),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(
    setting: str, name: str, dtype: str, device: tuple, message: str | None
):
    platform, capability = device
    found = SimpleNamespace(platform=platform, device_kind="Some", compute_capability=capability)
    if message is None:
        assert name in kernels_on(found, dtype, {setting: name})
    else:
        with pytest.raises(UserError, match=f"{setting}.attention={name} {message}.*set "):
            kernels_on(found, dtype, {setting: name})


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "names"),
    [
        ("tpu", None, "bfloat16", ("splash", "xla")),
        ("tpu", None, "float32", ("xla", "xla")),
        ("gpu", "9.0", "bfloat16", ("xla", "triton")),
        ("gpu", "9.0", "float32", ("xla", "xla")),
        ("gpu", "8.0", "bfloat16", ("xla", "xla")),
        ("cpu", None, "bfloat16", ("xla", "xla")),
    ],
)
def test_by_default_devices_have_the_kernels_that_are_tested(
    platform: str, capability: str | None, dtype: str, names: tuple[str, str]
):
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    assert kernels_on(device, dtype, {}) == names


def test_several_gpus_have_only_the_kernels_that_are_tested():
    device = SimpleNamespace(platform="gpu", device_kind="Some", compute_capability="9.0")
    assert kernels_on(device, "bfloat16", {}, devices=2) == ("xla", "xla")
    with pytest.raises(UserError, match="cudnn is not tested with heads sharded .*attention=xla"):
        kernels_on(device, "bfloat16", {"model": "cudnn"}, devices=2)


def test_head_sizes_that_triton_has_no_matmul_for_are_refused(toy):
    odd = [jnp.zeros(shape) for shape in ((1, 1, 1, 3, 8), (1, 4), (1, 4), *[(1, 1, 5, 8)] * 2)]
    own = [jnp.zeros((1, 1, 1, 8, 8))] * 2
    with pytest.raises(UserError, match="takes heads of size 16, .*these are of 8: set rollout"):
        attend_decode(*odd, jnp.array([5]), *own, jnp.int32(0))


def test_auto_is_what_the_table_says(monkeypatch: pytest.MonkeyPatch):
    """On one GPU; of several that shard heads, or hold several copies, only what is tested."""
    monkeypatch.setitem(kernels.AUTO_ON_GPUS, 8.0, kernels.Auto("cudnn", "triton"))
    device = SimpleNamespace(platform="gpu", device_kind="Some", compute_capability="8.0")
    assert kernels_on(device, "bfloat16", {}) == ("cudnn", "triton")
    assert kernels_on(device, "bfloat16", {}, devices=2) == ("xla", "xla")
    assert kernels_on(device, "float32", {}) == ("xla", "xla")


def kernels_on(
    device: SimpleNamespace, dtype: str, settings: dict[str, str], devices: int = 1
) -> tuple[str, str]:
    """Names of the kernels of long attention and of a decode step that a config has on a device."""
    mesh = SimpleNamespace(
        devices=np.array([device] * devices), size=devices, shape={"tensor": devices}
    )
    layout = SimpleNamespace(mesh=mesh, batch_sharding=lambda: None)
    model = ModelSettings(attention=settings.get("model", "auto"), dtype=dtype)
    rollout = RolloutSettings(attention=settings.get("rollout", "auto"))
    compute = compute_settings(Config("x", model=model, rollout=rollout), layout)
    return compute.attention.name, compute.decode_attention.name

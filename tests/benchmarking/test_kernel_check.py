"""`bench verify-kernels`: a kernel that is right passes, one that is wrong is found."""

import json
from collections.abc import Iterator
from dataclasses import replace

import jax
import numpy as np
import pytest

from spatial_ssrl_jax import bench
from spatial_ssrl_jax.benchmarking.kernel_check import (
    Measured,
    Sizes,
    check_attention,
    check_decode,
    kernel_lines,
    verdict,
)
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.qwen_vl import kernels
from spatial_ssrl_jax.qwen_vl.compute import XLA, AttentionKernel
from tests.conftest import random_params
from tests.rl.conftest import CONFIG

SIZES = Sizes(prompts=(13, 17), grid=4, group=2, response=5, slots=9)
CUDNN, TRITON = AttentionKernel("cudnn"), AttentionKernel("triton", interpret=True)


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """The programs run for milliseconds and compile for seconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def wrong_ones(rows: list[Measured]) -> list[tuple[str, str]]:
    """Kernel and inputs of what is wrong."""
    xla = {row.inputs: row for row in rows if row.kernel == "xla"}
    return [(r.kernel, r.inputs) for r in rows if not r.is_right(xla[r.inputs])]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, []),
        ({"mask": None}, [("cudnn", "groups"), ("cudnn", "rows")]),
    ],
    ids=["right", "without masks"],
)
def test_attention_that_is_wrong_is_found(
    monkeypatch: pytest.MonkeyPatch, change: dict, wrong: list
):
    """cuDNN's place is taken by the library's own XLA, which only a GPU has."""
    library = jax.nn.dot_product_attention

    def stand_in(*args, implementation: str, **more):
        return library(*args, implementation="xla", **more | change)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    params = random_params(CONFIG, seed=0)
    rows = check_attention(CONFIG, params, SIZES, [XLA, CUDNN], 1)
    assert [(row.kernel, row.inputs) for row in rows] == [
        (name, inputs) for inputs in ("groups", "rows") for name in ("xla", "cudnn")
    ]
    assert wrong_ones(rows) == wrong, rows
    assert all(row.forward_ms > 0 and row.gradients_ms > 0 for row in rows)


@pytest.mark.parametrize("off", [0, 1])
def test_decoding_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch, off: int):
    """It misses the prompt's last token."""
    right = kernels.attend_decode

    def stand_in(qkv, cos, sin, k, v, length, *rest, **more):
        return right(qkv, cos, sin, k, v, length - off, *rest, **more)

    monkeypatch.setattr(kernels, "attend_decode", stand_in)
    rows = check_decode(CONFIG.text, SIZES, [XLA, TRITON], 1)
    assert wrong_ones(rows) == [("triton", "steps")] * off, rows


def test_a_kernel_that_does_not_run_is_named(monkeypatch: pytest.MonkeyPatch):
    def broken(*_, **__):
        raise RuntimeError("no such library")

    monkeypatch.setattr(kernels, "attend_decode", broken)
    xla, row = check_decode(CONFIG.text, SIZES, [XLA, TRITON], 1)
    assert not xla.failure and "no such library" in row.failure
    assert "triton failed or gave wrong numbers" in verdict("rollout.attention", "xla", [xla, row])


def measured(kernel: str, error: float, ms: float) -> Measured:
    return Measured("model.attention", kernel, "groups", error, {"w": error}, ms, ms)


@pytest.mark.parametrize(
    ("auto", "error", "ms", "sentence"),
    [
        ("xla", 3.9, 1.0, "auto should be cudnn here and is xla: set model.attention=cudnn"),
        ("cudnn", 3.9, 1.0, "auto is right, cudnn is the fastest"),
        ("xla", 3.9, 3.0, "auto is right, xla is the fastest that gives right numbers."),
        ("cudnn", 4.1, 1.0, "auto should be xla here and is cudnn; cudnn failed or gave wrong"),
        ("cudnn", np.nan, 1.0, "auto should be xla here"),
    ],
)
def test_the_fastest_that_is_right_is_named(auto: str, error: float, ms: float, sentence: str):
    rows = [measured("xla", 1.0, 2.0), measured("cudnn", error, ms)]
    assert sentence in verdict("model.attention", auto, rows)


def test_one_weights_gradient_may_be_wrong():
    """Four times the error that XLA's has, or that is typical of XLA's where its own is smaller."""
    xla = Measured("", "xla", "", 1.0, {"a": 0.1, "b": 1.0, "c": 2.0})
    for errors, right in (
        ({"a": 3.9, "b": 3.9, "c": 7.9}, True),
        ({"a": 4.1, "b": 1.0, "c": 2.0}, False),
        ({"a": 0.1, "b": 1.0, "c": 8.1}, False),
    ):
        assert replace(xla, gradient_errors=errors).is_right(xla) is right
    assert not replace(xla, error=4.1).is_right(xla)


def test_a_cpu_has_nothing_to_choose(capsys: pytest.CaptureFixture):
    bench.main(["verify-kernels", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["kernels"] == [] and found["auto"] == {"attention": "xla", "decode": "xla"}
    assert len(found["verdicts"]) == 2
    assert all(
        "only xla, so there is nothing to choose" in line for line in kernel_lines(found)[1:]
    )
    with pytest.raises(UserError, match="--runs=0 must be at least 1"):
        bench.main(["verify-kernels", "--runs=0"])


def test_the_table_has_a_row_a_measurement():
    rows = [measured("xla", 1.0, 2.0), Measured("rollout.attention", "triton", "steps", 0.5, {}, 3)]
    rows.append(Measured("rollout.attention", "xla", "steps", failure="out of memory"))
    kernels = [vars(row) | {"gradient_error": row.gradient_error} for row in rows]
    found = {"device": "X", "compute_capability": "9.0", "kernels": kernels, "verdicts": ["end"]}
    device, head, first, second, third, end = kernel_lines(found)
    assert device == "X, compute capability 9.0" and head.startswith("setting") and end == "end"
    assert " ".join(first.split()) == "model.attention xla groups 1.00e+00 1.00e+00 2.000 2.000"
    assert " ".join(second.split()) == "rollout.attention triton steps 5.00e-01 - 3.000 -"
    assert " ".join(third.split()) == "rollout.attention xla steps out of memory"

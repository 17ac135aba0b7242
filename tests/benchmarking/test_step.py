"""The timings: what they report, and sizes that do not fit."""

import json
from pathlib import Path

import pytest

from spatial_ssrl_jax import bench
from spatial_ssrl_jax.benchmarking import step as timing
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.qwen_vl.compute import AttentionKernel

SIZES = ["--random-weights", "--prompts=2", "--group=2", "--new=16", "--grid=4", "--runs=1"]


@pytest.mark.parametrize(
    ("part", "figures"),
    [
        (
            "rollout",
            {
                "rollout_tok_s",
                "decode_tok_s",
                "decode_step_seconds",
                "decode_bytes_per_step",
                "decode_flops_per_step",
                "matmul_seconds",
                "share_of_matmul_bound",
            },
        ),
        ("update", {"step_seconds"}),
        (
            "step",
            {
                "step_seconds",
                "rollout_seconds",
                "reference_seconds",
                "update_seconds",
                "mismatch_max",
                "mismatch_mean",
            },
        ),
    ],
)
def test_each_part_reports_its_figures(
    toy_folder: Path, capsys: pytest.CaptureFixture, part: str, figures: set[str]
):
    more = ["--matmuls"] if part == "rollout" else []
    bench.main([part, f"--model={toy_folder}", *SIZES, "--prompt-tokens=12", "--json", *more])
    found = json.loads(capsys.readouterr().out)
    assert figures <= found.keys()
    useful = ("useful_flops", "flops_per_second", "useful_bytes", "bytes_per_second")
    assert all(found[name] > 0 for name in (*figures, *useful, "seconds"))
    for share in (found["share_of_peak"], found["share_of_bandwidth"]):
        assert share is None or 0 < share < 1
    if part == "step":
        phases = sum(found[f"{name}_seconds"] for name in ("rollout", "reference", "update"))
        assert phases == pytest.approx(found["step_seconds"], rel=0.2)
        assert found["mismatch_mean"] <= found["mismatch_max"] < 1e-4


def test_a_profile_names_the_kernels(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Of decoding alone, whose trace is written; as lines, each kernel has one."""
    argv = ["rollout", f"--model={toy_folder}", *SIZES, "--prompt-tokens=12"]
    bench.main([*argv, f"--profile={tmp_path}", "--json"])
    found = json.loads(capsys.readouterr().out)
    kernels = found["kernels"]
    assert [k["seconds"] for k in kernels] == sorted((k["seconds"] for k in kernels), reverse=True)
    assert 0.5 < sum(k["share"] for k in kernels) <= 1 + 1e-6
    assert sum(k["seconds"] for k in kernels) <= found["busy_seconds"] * (1 + 1e-6)
    assert all(k["calls"] > 0 and not k["name"][-1].isdigit() for k in kernels)
    assert list(tmp_path.rglob("*.xplane.pb"))
    bench.main([*argv, f"--profile={tmp_path}"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("kernels ") for line in lines) == len(kernels)


def test_a_prompt_too_short_for_its_picture_is_refused(toy_folder: Path):
    with pytest.raises(UserError, match="--prompt-tokens=6 and --grid=4 do not fit"):
        bench.main(["rollout", f"--model={toy_folder}", *SIZES, "--prompt-tokens=6"])


def test_what_bench_refuses_is_named_as_its_options(toy_folder: Path):
    argv = ["rollout", f"--model={toy_folder}", *SIZES, "--prompt-tokens=12"]
    with pytest.raises(UserError, match="--step-attention=triton runs .*set --step-attention=xla"):
        bench.main([*argv, "--step-attention=triton"])
    with pytest.raises(UserError, match="--attention=splash runs .*set --attention=xla"):
        bench.main([*argv, "--attention=splash"])


def test_products_are_not_counted_beside_the_gpus_kernel(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(timing, "choose_decode_kernel", lambda *_: AttentionKernel("triton"))
    argv = ["rollout", f"--model={toy_folder}", *SIZES, "--prompt-tokens=12", "--matmuls"]
    with pytest.raises(UserError, match="--matmuls counts XLA's .*set --step-attention=xla"):
        bench.main(argv)

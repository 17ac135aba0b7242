"""The timings of rollout, update and step: their metrics, and sizes that do not fit."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from spatial_ssrl_jax import bench
from spatial_ssrl_jax.benchmarking import workload
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.qwen_vl.compute import AttentionKernel

SIZES = ["--random-weights", "--prompts=2", "--group=2", "--new=16", "--grid=4", "--runs=1"]


@pytest.mark.parametrize(
    ("part", "metrics"),
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
def test_each_part_reports_its_metrics(
    toy_folder: Path, capsys: pytest.CaptureFixture, part: str, metrics: set[str]
):
    more = ["--matmuls"] if part == "rollout" else []
    bench.main([part, f"--model={toy_folder}", *SIZES, "--prompt-tokens=12", "--json", *more])
    found = json.loads(capsys.readouterr().out)
    assert metrics <= found.keys()
    useful = ("useful_flops", "flops_per_second", "useful_bytes", "bytes_per_second")
    assert all(found[name] > 0 for name in (*metrics, *useful, "seconds"))
    for share in (found["share_of_peak"], found["share_of_bandwidth"]):
        assert share is None or 0 < share < 1
    if part == "step":
        phases = sum(found[f"{name}_seconds"] for name in ("rollout", "reference", "update"))
        assert phases == pytest.approx(found["step_seconds"], rel=0.2)
        assert found["mismatch_mean"] <= found["mismatch_max"] < 1e-4


def test_samples_end_at_given_lengths(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Rows leave as theirs end."""
    (tmp_path / "lengths").write_text("5\n")
    argv = [f"--model={toy_folder}", *SIZES, "--prompt-tokens=12", "--json"]
    argv.append(f"--lengths={tmp_path / 'lengths'}")
    bench.main(["rollout", *argv])
    found = json.loads(capsys.readouterr().out)
    samples, seconds = 4, found["seconds"]
    assert found["rollout_tok_s"] == pytest.approx(samples * 5 / seconds)
    assert found["repeated_tok_s"] == pytest.approx(samples * (12 + 5) / seconds)
    assert found["samples_s"] == pytest.approx(samples / seconds)
    assert found["decode_steps"] == 8 and found["decode_occupancy"] == pytest.approx(5 / 8)
    assert "decode_tok_s" not in found
    longest = found["useful_flops"]
    bench.main(["update", *argv])
    assert json.loads(capsys.readouterr().out)["useful_flops"] == pytest.approx(3 * longest)


@pytest.mark.parametrize(
    ("argv", "shapes"),
    [
        ([], [(2, 44)]),
        (["--micro-batch-rows=1"], [(1, 44), (1, 44)]),
        (["--micro-batch-rows=3"], [(3, 44)]),
        (["--row-tokens=88"], [(1, 88)]),
        (["--row-tokens=88", "--micro-batch-rows=2"], [(2, 88)]),
        (["--row-tokens=20"], [(2, 44)]),
        (["--lengths=mean=5,sigma=0", "--row-tokens=88"], [(1, 88)]),
        (["--lengths=mean=5,sigma=0"], [(1, 44)]),
    ],
)
def test_an_updates_groups_are_packed(toy_folder: Path, argv: list[str], shapes: list):
    """Of 12 + 2 x 16 tokens each, or of 12 + 2 x 5, two of which share a row; no row is too short
    for the longest.
    """
    parser = argparse.ArgumentParser()
    workload.add_options(parser)
    sizes = [f"--model={toy_folder}", *SIZES, "--prompt-tokens=12"]
    opened, params = workload.Workload.open(parser.parse_args([*sizes, *argv]))
    rollout = opened.sample(params)
    batches = opened.groups(rollout)
    assert [batch.rows.ids.shape for batch in batches] == shapes
    assert sum(float(batch.weight.sum()) for batch in batches) == pytest.approx(1)
    held = [np.asarray(batch.rows.place) >= 0 for batch in batches]
    found = [np.asarray(b.sampled_logprobs)[there] for b, there in zip(batches, held, strict=True)]
    assert np.concatenate(found).size == rollout.length.sum()
    own = np.arange(16) < rollout.length[..., None]
    assert sorted(np.concatenate(found)) == sorted(rollout.logprobs[own])


def test_a_profile_is_written(toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    argv = ["rollout", f"--model={toy_folder}", *SIZES, "--prompt-tokens=12"]
    bench.main([*argv, f"--profile={tmp_path}"])
    assert capsys.readouterr().out.startswith("rollout_tok_s ")
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_a_prompt_too_short_for_its_image_is_refused(toy_folder: Path):
    with pytest.raises(UserError, match="--prompt-tokens=6 and --grid=4 do not fit"):
        bench.main(["rollout", f"--model={toy_folder}", *SIZES, "--prompt-tokens=6"])


def test_errors_name_the_options_of_bench(toy_folder: Path):
    argv = ["rollout", f"--model={toy_folder}", *SIZES, "--prompt-tokens=12"]
    with pytest.raises(UserError, match="--step-attention=triton runs .*set --step-attention=xla"):
        bench.main([*argv, "--step-attention=triton"])
    with pytest.raises(UserError, match="--attention=splash runs .*set --attention=xla"):
        bench.main([*argv, "--attention=splash"])


def test_matmuls_are_not_counted_with_the_gpus_kernel(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(workload, "choose_decode_kernel", lambda *_: AttentionKernel("triton"))
    argv = ["rollout", f"--model={toy_folder}", *SIZES, "--prompt-tokens=12", "--matmuls"]
    with pytest.raises(UserError, match="--matmuls counts XLA's .*set --step-attention=xla"):
        bench.main(argv)

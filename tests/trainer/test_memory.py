"""Out of device memory: one sentence with what helps, and nothing else is swallowed."""

import dataclasses
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from spatial_ssrl_jax import bench
from spatial_ssrl_jax import config as c
from spatial_ssrl_jax.benchmarking import training_timing as timing
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.qwen_vl.lora import LoraSettings
from spatial_ssrl_jax.trainer import stage_steps, training
from spatial_ssrl_jax.trainer.memory import explain_out_of_memory, memory_advice

TPU = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 20.1G of 15.75G hbm."
)
GPU = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 34359738368 bytes."


@pytest.mark.parametrize(("error", "part"), [(GPU, "34359738368 bytes more"), (TPU, "ran out")])
def test_a_lack_of_memory_becomes_a_user_error(error: str, part: str):
    with (
        pytest.raises(UserError, match=f"{part}.*: lower grpo.batch_prompts; or pray.$"),
        explain_out_of_memory(["lower grpo.batch_prompts", "pray"]),
    ):
        raise jax.errors.JaxRuntimeError(error)


def test_other_errors_go_through():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), explain_out_of_memory(["x"]):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_a_real_lack_of_memory_is_known_as_such():
    """Requests a petabyte."""
    with (
        pytest.raises(UserError, match="ran out of memory"),
        explain_out_of_memory(["ask for less"]),
    ):
        jax.block_until_ready(jax.numpy.zeros((2**25, 2**25), "uint8"))


def test_advice_leaves_out_what_is_done_already():
    config = c.Config("x", model=c.ModelSettings(remat="none"), sft=c.SftSettings(steps=3))
    advice = "; ".join(memory_advice(config))
    for name in (
        "grpo.micro_batch_rows=16",
        "sft.micro_batch_rows=8",
        "lower rollout.batch_prompts;",
        "model.remat",
    ):
        assert name in advice
    lean = dataclasses.replace(
        config,
        model=c.ModelSettings(),
        sft=c.SftSettings(),
        grpo=c.GrpoSettings(micro_batch_rows=1, lora=LoraSettings(8)),
    )
    advice = "; ".join(memory_advice(lean))
    for name in ("micro_batch_rows", "model.remat", "lora"):
        assert name not in advice


def full(*_):
    raise jax.errors.JaxRuntimeError(GPU)


def test_training_says_what_helps(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from tests.helpers.toy_runs import make_config

    monkeypatch.setattr(stage_steps, "train_step", full)
    monkeypatch.setattr(training, "validate", lambda *_: ({}, False))
    config = make_config(c.ModelSettings(str(toy_folder), True, "float32", "none"))
    with pytest.raises(
        UserError, match="ran out of memory.*sft.micro_batch_rows=.*model.remat=full"
    ):
        training.train(config, tmp_path / "run")


def test_a_timing_says_what_helps(toy_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "train_step", full)
    argv = ["--random-weights", "--prompts=1", "--group=2", "--new=8", "--grid=4"]
    with pytest.raises(UserError, match="ran out of memory.*--micro-batch-rows"):
        bench.main(["update", f"--model={toy_folder}", *argv, "--prompt-tokens=12"])


KEPT = """
import os
import numpy as np
from spatial_ssrl_jax.trainer.memory import keep_freed_memory

def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

keep_freed_memory()
before = resident()
np.ones(2**28, np.uint8)
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize(("platforms", "kept"), [("cpu", True), ("tpu,cpu", False)])
def test_on_cpu_alone_freed_memory_is_kept(platforms: str, kept: bool):
    environment = os.environ | {"JAX_PLATFORMS": platforms}
    command = [sys.executable, "-c", KEPT]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (int(found.stdout) > 2**27) is kept

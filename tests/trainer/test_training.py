"""A whole run: what it leaves, that it can stop and continue, and that devices change nothing."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax import generate
from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.outputs import MARKER
from spatial_ssrl_jax.data.images import open_image
from spatial_ssrl_jax.monitoring.metrics import read_metrics
from spatial_ssrl_jax.parallel.compile_ahead import CompileAhead
from spatial_ssrl_jax.qwen_vl.weights import read_params
from spatial_ssrl_jax.trainer import context, training
from spatial_ssrl_jax.trainer.training import train
from tests.conftest import ROOT


def figures(workdir: Path) -> list[dict]:
    """The metrics without what depends on the clock or the machine."""
    timed = ("perf/", "memory/", "time")
    return [{k: v for k, v in r.items() if not k.startswith(timed)} for r in read_metrics(workdir)]


def weights(workdir: Path) -> list[np.ndarray]:
    export = workdir / "export"
    params = read_params(export, open_model(str(export)).config)
    return [np.asarray(x) for x in jax.tree.leaves(params)]


def test_a_run_leaves_what_it_should(whole: Path):
    names = {path.name.split(".")[0] or path.name for path in whole.iterdir()}
    assert names == {
        "config", "inputs", "metrics", "summary", "events", "checkpoints", "rollouts", "report",
        "export", MARKER,
    }  # fmt: skip
    steps = {path.name for path in (whole / "checkpoints").iterdir() if path.name.isdigit()}
    assert steps >= {"2", "4", "5"}  # where SFT ended, and the newest two
    rows = figures(whole)
    assert [(r["stage"], r["step"]) for r in rows] == [
        ("sft", 0), ("sft", 1), ("sft", 2), ("grpo", 3), ("grpo", 4), ("grpo", 5)
    ]  # fmt: skip
    assert all(np.isfinite(v) for r in rows for v in r.values() if isinstance(v, float))
    assert {r["step"] for r in rows if "heldout/flip/accuracy_greedy" in r} == {0, 2, 4, 5}
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["trained"] == ["shuffle", "flip"] and summary["seed"] == 0
    assert set(summary["seconds"]) == {"heldout", "sft", "grpo"}
    for stage, table in summary["heldout"].items():
        tasks = {name for name in table if "/" not in name}
        assert tasks == {"shuffle", "flip", "crop", "depth", "position", "mean"}
        for row in table.values():
            assert set(row) == {
                "accuracy_greedy", "accuracy_sampled", "format", "reward", "chance", "count",
                *(["accuracy_grey"] if stage == "grpo" else []),
            }  # fmt: skip
    mean, rows = summary["heldout"]["grpo"]["mean"], summary["heldout"]["grpo"]
    for name in ("accuracy_sampled", "reward"):
        assert mean[name] == np.mean([rows[task][name] for task in summary["trained"]])


def test_servers_of_an_export_sample_as_training_does(lora_run: Path):
    """No penalty, and no limit of the tokens drawn from, where absent keys would set one."""
    config = open_model(str(lora_run / "export")).config
    exported = json.loads((lora_run / "export" / "generation_config.json").read_text())
    assert exported == {
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.bos_token_id,
        "eos_token_id": [config.eos_token_id, config.bos_token_id],
        "do_sample": True,
        "temperature": 0.9,
        "top_p": 1.0,
        "top_k": config.text.vocab_size,
        "repetition_penalty": 1.0,
    }


def test_the_images_it_logs_are_there(whole: Path):
    (path,) = (whole / "rollouts").glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 2 and all(len(row["responses"]) == 3 for row in rows)
    for row in rows:
        assert all(open_image(path.parent / name).ndim == 3 for name in row["images"])


def test_sft_teaches_the_format(taught: Path):
    heldout = json.loads((taught / "summary.json").read_text())["heldout"]
    assert heldout["untrained"]["mean"]["format"] == 0
    assert heldout["sft"]["mean"]["format"] > 0.3


def test_the_weights_move_in_both_stages(whole: Path):
    rows = [r for r in read_metrics(whole) if r["step"]]
    assert all(r["optim/gradient_norm"] > 0 for r in rows)
    late = [r for r in rows if r["stage"] == "grpo"]
    assert all(r["reward/overall_std"] > 0 for r in late) and late[-1]["kl/mean"] > 0


class StopAfter:
    """Stands in for `Preemption`: asks to stop at the look number `looks`.

    Before a stage there are two, one of them before anything is measured.
    """

    looks = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    @property
    def requested(self) -> bool:
        StopAfter.looks -= 1
        return StopAfter.looks == 0


def test_programs_are_kept_and_compiled_ahead_as_the_config_says(
    toy_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Until the run ends, which is at once here."""
    seen, queues = [], []

    @contextmanager
    def cache(*args):
        seen.append(args[:2])
        yield
        seen.append("closed")

    def ahead(setting: str) -> bool:
        seen.append(setting)
        return True

    monkeypatch.setattr(training, "Preemption", StopAfter)
    monkeypatch.setattr(context, "compilation_cache", cache)
    monkeypatch.setattr(context, "compiles_ahead", ahead)
    monkeypatch.setattr(CompileAhead, "close", lambda queue: queues.append(queue))
    StopAfter.looks = 1
    settings = c.CompileSettings(cache="elsewhere", ahead="never")
    assert not train(toy_config(compile=settings), tmp_path / "run")
    assert seen == [(settings, tmp_path / "run"), "never", "closed"]
    assert len(set(queues)) == 2 and all(queue.enabled for queue in queues)


@pytest.mark.parametrize(("looks", "stop"), [(2, 0), (3, 1), (4, 2), (8, 4)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    toy_config, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: int, stop: int
):
    monkeypatch.setattr(training, "Preemption", StopAfter)
    StopAfter.looks = looks
    assert not train(toy_config(), tmp_path / "run")
    assert figures(tmp_path / "run")[-1]["step"] == stop
    assert train(toy_config(), tmp_path / "run")
    assert figures(tmp_path / "run") == figures(whole)
    for ours, theirs in zip(weights(tmp_path / "run"), weights(whole), strict=True):
        assert np.array_equal(ours, theirs)


def test_another_config_does_not_resume(toy_config, whole: Path):
    changes = dict(group_size=5, learning_rate=1e-6, minibatches_per_rollout=1)
    changed = toy_config(grpo=dataclasses.replace(toy_config().grpo, **changes))
    with pytest.raises(
        UserError, match="grpo.group_size, grpo.learning_rate, grpo.minibatches_per_rollout changed"
    ):
        train(changed, whole)


def write_config(folder: Path, config: c.Config) -> Path:
    """A config file that gives `config`, for runs in processes of their own."""
    text = f"import pickle\ndef get_config():\n    return pickle.loads({pickled(config)!r})\n"
    path = folder / "config.py"
    path.write_text(text)
    return path


def pickled(config: c.Config) -> bytes:
    import pickle

    return pickle.dumps(config)


def start(config: Path, workdir: Path, devices: int, *argv: str) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "spatial_ssrl_jax.train", f"--config={config}"]
        + [f"--workdir={workdir}", *argv],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes: subprocess.Popen) -> None:
    for process in processes:
        out, err = process.communicate(timeout=900)
        assert process.returncode == 0, out + err


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Equal rewards and lengths (so equal tokens); metrics and weights as close as fp32 lets."""
    for a, b in zip(figures(ours), figures(theirs), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name.startswith(("reward/", "task/", "response/", "prompt/", "heldout/")):
                assert a[name] == b[name], (name, a["step"])
            elif isinstance(a[name], float):
                assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-5), (name, a["step"])
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        assert np.abs(a - b).max() < 2e-3 * max(np.abs(b).max(), 0.1)


def test_eight_devices_change_nothing(toy_config, whole: Path, tmp_path: Path):
    sampling = dataclasses.replace(toy_config().rollout, tensor=2)
    mesh = c.MeshSettings(data=2, fsdp=2, tensor=2)
    config = write_config(tmp_path, toy_config(mesh=mesh, rollout=sampling))
    finish(start(config, tmp_path / "run", 8))
    assert_same_run(tmp_path / "run", whole)


def test_a_signal_saves_and_exits_with_0(toy_config, tmp_path: Path):
    sft = dataclasses.replace(toy_config().sft, steps=500)
    config = write_config(tmp_path, toy_config(sft=sft))
    process = start(config, tmp_path / "run", 1)
    for line in process.stdout:
        if line.startswith("sft "):
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "the same command resumes from here" in out
    last = figures(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / str(last)).is_dir() and last < 500


@pytest.mark.parametrize("kind", ["nyu", "diode", "megadepth", "folder"])
def test_real_images(toy_config, shared: Path, tmp_path: Path, kind: str):
    place = {"nyu": "rgbd/nyu_depth_v2", "folder": "photos"}.get(kind, f"rgbd/{kind}")
    config = toy_config()
    data = {"source": f"{kind}:{shared / place}", "heldout_fraction": 0.3}
    config = toy_config(
        data=c.DataSettings(**(vars(config.data) | data)),
        tasks=config.tasks
        | ({} if kind == "folder" else {"depth": with_weight(config.tasks["depth"])}),
        sft=c.SftSettings(),
        grpo=c.GrpoSettings(**(vars(config.grpo) | {"steps": 2})),
    )
    assert train(config, tmp_path / "run")
    rows = figures(tmp_path / "run")
    assert [r["stage"] for r in rows if r["step"]] == ["grpo", "grpo"]
    assert all(r["optim/skipped"] == 0 for r in rows if r["step"])
    assert all(r["prompt/length_mean"] > 20 for r in rows if r["step"])


def with_weight(settings):
    return type(settings)(**(vars(settings) | {"weight": 1.0}))


def test_the_export_answers_alike_in_transformers(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    torch = pytest.importorskip("torch", reason="compares with Transformers, which needs torch")
    from PIL import Image
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    pixels = np.random.default_rng(0).integers(0, 256, (80, 112, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    export = whole / "export"
    question = [f"--image={tmp_path / 'x.png'}", "--question=Where is the region?"]
    generate.main([f"--model={export}", *question, "--max-new-tokens=16", "--json"])
    ours = json.loads(capsys.readouterr().out)

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(export, dtype=torch.float32)
    inputs = Qwen2VLImageProcessorPil.from_pretrained(export)(images=[pixels], return_tensors="pt")
    ids = torch.tensor([ours["prompt_ids"]])
    text = AutoTokenizer.from_pretrained(export).decode(ours["prompt_ids"])
    assert text.endswith("Where is the region?<|im_end|>\n<|im_start|>assistant\n")
    types = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=types,
            **inputs,
            max_new_tokens=16,
            do_sample=False,
            repetition_penalty=1.0,
        )
    assert out[0, ids.shape[1] :].tolist() == ours["samples"][0]["ids"]


def test_every_promised_figure_is_there(whole: Path):
    """What users of such trainers look for, under the names of the list; MFU needs a known peak."""
    row = [r for r in read_metrics(whole) if r["stage"] == "grpo"][-1]
    parts = [f"reward/{name}_{of}" for name in REWARDS for of in ("mean", "std")]
    for task in ("shuffle", "flip"):
        parts += [f"task/{task}/{name}{of}" for name in ("reward", *REWARDS[1:]) for of in ENDS]
    parts += [f"response/length_{of}" for of in ("mean", "min", "max")]
    parts += [f"perf/{phase}_seconds" for phase in PHASES]
    assert set(parts) | PROMISED <= row.keys()
    assert row["perf/flops_per_second"] * row["perf/step_seconds"] == pytest.approx(
        row["perf/useful_flops"]
    )
    assert row["perf/compile_seconds"] > 0 and "perf/mfu" not in row


def test_the_host_gap_is_what_no_program_runs_in(whole: Path):
    for row in read_metrics(whole)[1:]:
        gap, step = row["perf/host_gap_seconds"], row["perf/step_seconds"]
        assert row["perf/input_wait_seconds"] <= gap < step
        if row["stage"] == "grpo":
            assert gap >= row["perf/input_wait_seconds"] + row["perf/reward_seconds"]
            assert gap <= step - row["perf/rollout_seconds"] - row["perf/update_seconds"]


REWARDS, ENDS = ("overall", "accuracy", "format"), ("", "_std")
PHASES = ("step", "rollout", "reward", "reference", "update", "input_wait", "compile")
PROMISED = {
    "advantage/zero_variance_share", "response/clipped_share", "kl/mean", "policy/entropy",
    "policy/clip_low", "policy/clip_high", "optim/gradient_norm", "optim/learning_rate",
    "mismatch/logprob_mean", "perf/tokens_per_second", "prompt/dropped_share",
    "perf/compilations", "memory/host_bytes",
}  # fmt: skip


def test_little_compiles_late(whole: Path):
    """What is left of a rollout may need a size of decode program that none needed before."""
    rows = {r["step"]: r for r in read_metrics(whole) if r["step"]}
    sizes = 6  # of 8 prompts x 3 samples in 16 and 32 slots
    late = rows[5]["perf/model_programs"] - rows[4]["perf/model_programs"]
    assert late <= sizes - 2
    # With it come the programs that choose its rows, and none of the others.
    assert rows[5]["perf/compilations"] - rows[4]["perf/compilations"] <= 8 * late
    # SFT's and GRPO's gradients, log-probabilities, prefill; decoding, and that of held-out images.
    assert 4 <= rows[5]["perf/model_programs"] <= 4 + 3 + sizes + 4
    assert 0 <= rows[5]["perf/compilations_read"] <= rows[5]["perf/compilations"]


def test_flat_groups_are_refilled_the_same_each_time(toy_config, tmp_path: Path):
    grpo = c.GrpoSettings(
        **(vars(toy_config().grpo) | {"steps": 1, "filter_groups": True, "max_resamples": 2})
    )
    config = toy_config(grpo=grpo, sft=c.SftSettings())
    for name in "ab":
        assert train(config, tmp_path / name)
    rows = figures(tmp_path / "a")
    assert rows == figures(tmp_path / "b")
    assert rows[-1]["prompt/refilled"] in (16, 32)


def test_seeds_differ(toy_config: Callable[..., c.Config], whole: Path, tmp_path: Path):
    assert train(toy_config(seed=1, grpo=c.GrpoSettings(steps=0)), tmp_path / "run")
    assert figures(tmp_path / "run")[1]["loss/sft"] != figures(whole)[1]["loss/sft"]

"""`plan`: the programs that training runs, their memory, what else is there, what does not fit."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import jax
import pytest

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax import plan as command
from spatial_ssrl_jax.checkpoint.models import open_model, read_shape
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.processor import PromptSize
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.perf.device_specs import DeviceSpec
from spatial_ssrl_jax.perf.response_lengths import LogNormalLengths
from spatial_ssrl_jax.planning.planner import Buffer, Plan, ProgramCost, plan
from spatial_ssrl_jax.planning.programs import PlannedProgram, RolloutLengths, planned_stages
from spatial_ssrl_jax.planning.report import lines, problems
from spatial_ssrl_jax.planning.topology import Topology
from spatial_ssrl_jax.qwen_vl.model import abstract_params
from spatial_ssrl_jax.rl.bucketing import BatchShape
from spatial_ssrl_jax.rollout.cache import kv_token_bytes
from tests.conftest import ROOT, SMALL_TEXT
from tests.helpers.toy_runs import make_config

FIELDS = {
    "name", "peak_bytes", "argument_bytes", "temp_bytes", "flops", "bytes_accessed",
    "collective_bytes", "estimated_seconds", "bound", "compile_seconds", "largest_buffers", "fits",
}  # fmt: skip

PROMPTS = PromptSize(150, 240), BatchShape(160, 256)  # and what they are padded to


@pytest.fixture(scope="module")
def toy_plan(toy_folder: Path) -> c.Config:
    """A run of both stages of which nothing but the header of its model exists."""
    return make_config(c.ModelSettings(str(toy_folder), False, "float32", "none"))


@pytest.fixture(scope="module")
def planned(toy_plan: c.Config) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        spec = DeviceSpec(1e12, 1e9, memory=2**34, network=1e9)
        patch.setattr(
            "spatial_ssrl_jax.planning.planner.open_topology",
            lambda name: Topology(name, jax.devices("cpu")[:1], spec),
        )
        return plan(toy_plan, "one", lambda _: None)


@pytest.fixture(scope="module")
def report(planned: Plan) -> dict:
    return json.loads(json.dumps(planned.as_json()))


def program(report: dict, name: str) -> dict:
    return next(p for p in report["programs"] if p["name"] == name)


def test_every_program_of_both_stages_is_planned(report: dict):
    names = [p["name"] for p in report["programs"]]
    assert names == [
        "sft_gradients", "sft_add", "sft_apply",
        "rollout_weights", "rollout_reshard", "rollout_reshard_layer", "prefill",
        "start", "grow", "decode", "old_logprobs", "reference_logprobs", "gradients", "apply",
    ]  # fmt: skip
    assert all(p.keys() >= FIELDS for p in report["programs"])
    assert report["fits"] and report["devices"] == 1 and report["hbm_bytes"] == 2**34


def test_a_step_is_the_sum_of_its_programs(report: dict):
    """16 prompts are two rollout batches of 8 and two micro-batches; caches of 16 grow to 32."""
    runs = {p["name"]: p["runs"] for p in report["programs"]}
    assert runs["prefill"] == runs["gradients"] == runs["apply"] == 2
    assert runs["old_logprobs"] == 1 and runs["reference_logprobs"] == 2
    assert runs["grow"] == 2 * SMALL_TEXT["num_hidden_layers"]
    assert runs["decode"] == 2 and runs["rollout_weights"] == 1
    grpo = [p for p in report["programs"] if not p["name"].startswith("sft")]
    seconds = sum(p["runs"] * p["estimated_seconds"] for p in grpo)
    assert report["step"]["estimated_seconds"] == pytest.approx(seconds)
    tokens = 16 * (192 + 3 * 32)
    assert report["step"]["tokens_per_second_per_chip"] == pytest.approx(tokens / seconds)


def programs_of(
    config: c.Config, lengths: RolloutLengths | None = None
) -> dict[str, PlannedProgram]:
    """The programs of a run of one stage, whose results are not sharded."""
    model = read_shape(config.model.path)
    layout = Layout(make_mesh(config.mesh, jax.devices("cpu")[:1]))
    (stage,) = planned_stages(config, model, layout, layout.rollout(1), None, lengths)
    found, result = {}, None
    with suppress(StopIteration):
        while True:
            program = stage.programs.send(result)
            found[program.name] = program
            shapes = program.function.eval_shape(*program.args)
            result = jax.tree.map(lambda x: x.update(sharding=layout.replicated()), shapes)
    return found


def test_decoding_takes_the_steps_that_lengths_need(toy_plan: c.Config):
    """In the shapes of the schedule; the one with the widest caches shows the memory alone."""
    config = dataclasses.replace(toy_plan, sft=c.SftSettings(steps=0))
    lengths = RolloutLengths(LogNormalLengths(mean=12, sigma=0.5, cap=40), *PROMPTS)
    found = programs_of(config, lengths)
    decode = {name: p for name, p in found.items() if name.startswith("decode_")}
    assert {"decode_8x3x16", "decode_4x2x32"} <= decode.keys()
    assert found["decode"].runs == found["prefill"].runs == 0
    prefill = found["prefill_160"]
    assert prefill.runs * len(prefill.args[1].ids) == config.grpo.prompts
    assert (prefill.args[1].ids.shape[1], prefill.args[1].vision.length) == (160, 256)
    sixteen = decode["decode_8x3x16"]
    steps = 2 * 16  # of two rollout batches, which all have responses of 16 tokens
    assert sixteen.runs * sixteen.args[2] == pytest.approx(steps)
    assert sum(p.runs * p.args[2] for p in decode.values()) < 2 * 32
    weights, prefix, samples, keys = decode["decode_4x2x32"].args[3:]
    assert prefix.valid.shape == (4, 160) and keys.shape == (4, 2)
    assert samples.finished.shape == (4, 2) and samples.layers[0][0].shape[3] == 32


def test_leftovers_of_several_batches_are_decoded_together(toy_plan: c.Config):
    """And lie beside the prefill of later ones."""
    rollout = dataclasses.replace(toy_plan.rollout, kv_block=8, batch_prompts=4)
    config = dataclasses.replace(toy_plan, rollout=rollout, sft=c.SftSettings(steps=0))
    found = programs_of(config, RolloutLengths(LogNormalLengths(4, 0.6, 32, 0.4), *PROMPTS))
    assert found["decode_1x1x16"].args[4].valid.shape == (1, 160)
    twice = dataclasses.replace(config, rollout=dataclasses.replace(rollout, batch_prompts=8))
    beside = [programs_of(one)["prefill"].beside.get("leftovers") for one in (config, twice)]
    text = read_shape(config.model.path).text
    assert beside == [(192 + 8) * kv_token_bytes(text, "float32"), None]  # of one row


def test_updates_run_the_programs_of_the_shapes_that_lengths_need(toy_plan: c.Config):
    """Each row holds one group. Those of 3 x 12 tokens, about, take rows of 48 response tokens, and
    the longest ones rows of 96, which show the memory alone then.
    """
    grpo = dataclasses.replace(toy_plan.grpo, row_patches=(320, 320), row_responses=(48, 96))
    config = dataclasses.replace(toy_plan, grpo=grpo, sft=c.SftSettings(steps=0))
    names = {"old_logprobs", "reference_logprobs", "gradients"}
    longest = programs_of(config)
    assert {name: longest[name].runs for name in names} == dict.fromkeys(names, 2) | {
        "old_logprobs": 1
    }
    assert not [name for name in longest if name.endswith("_1")]
    alike = LogNormalLengths(mean=12, sigma=0.1, cap=32)
    found = programs_of(config, RolloutLengths(alike, *PROMPTS))
    assert {name: found[f"{name}_1"].runs for name in names} == pytest.approx(
        {name: longest[name].runs for name in names}
    )
    assert all(found[name].runs == 0 for name in names)
    for name, responses in (("gradients_1", 48), ("gradients", 96)):
        rows = found[name].args[3].rows
        assert rows.ids.shape == (8, 192 + 96) and rows.place.shape == (8, responses)
        assert rows.vision.length == 320
    assert found["apply"].runs == 2 and "add" not in found


def test_an_update_of_more_rows_sums_gradients(toy_plan: c.Config):
    """Eight groups an update, in rows of one each, four of them at a time."""
    grpo = dataclasses.replace(toy_plan.grpo, micro_batch_rows=4)
    found = programs_of(dataclasses.replace(toy_plan, grpo=grpo, sft=c.SftSettings(steps=0)))
    assert found["gradients"].runs == 4 and found["add"].runs == 2
    assert found["gradients"].beside["gradients so far"] == found["add"].beside["weights"]


def test_memory_is_the_weights_and_what_else_is_on_the_device(report: dict, toy_folder: Path):
    weights = sum(
        x.size for x in jax.tree.leaves(abstract_params(open_model(str(toy_folder)).config))
    )
    apply, decode = program(report, "apply"), program(report, "decode")
    assert apply["argument_bytes"] == pytest.approx(4 * 4 * weights, rel=0.01)
    assert apply["beside"]["reference"] == 4 * weights
    assert decode["beside"]["weights"] == 4 * weights
    assert decode["beside"]["optimizer"] == pytest.approx(8 * weights, rel=0.01)
    for p in report["programs"]:
        assert p["peak_bytes"] >= p["argument_bytes"] + sum(p["beside"].values())


def test_decoding_counts_all_its_steps(report: dict):
    """16 steps of 24 samples, each of which passes head and layers once, read the weights once."""
    decode, gradients = program(report, "decode"), program(report, "gradients")
    config = open_model("tiny").config.text
    head = 2 * 32 * config.vocab_size
    assert decode["flops"] > 16 * 24 * head
    assert decode["bytes_accessed"] > 16 * 4 * 32 * config.vocab_size
    assert gradients["flops"] > 3 * 24 * 32 * head


def test_what_does_not_fit_is_named(planned: Plan):
    cost = ProgramCost("decode", 1, {"weights": 3 * 2**30}, "rollout.batch_prompts", 2**31, 2**32)
    cost.fits = False
    cost.largest_buffers = [Buffer("[*].layers", 2**30)]
    tight = dataclasses.replace(planned, programs=[cost])
    (sentence,) = problems(tight)
    assert sentence.startswith("decode needs 9.00 GiB of 16.00 GiB (its temporaries 4.00 GiB")
    assert "[*].layers, 1.00 GiB" in sentence and "lower rollout.batch_prompts" in sentence
    (sentence,) = problems(dataclasses.replace(tight, hbm_bytes=None))
    assert sentence.startswith("decode needs 9.00 GiB (its temporaries")
    table = list(lines(planned))
    assert " DCN " in table[1]
    assert table[-2].startswith("decoding of a step: 0.3 s")
    assert len(table) == len(planned.programs) + 4 and table[-1].startswith("a step: ")


def test_sizes_that_do_not_fit_together_are_refused(toy_plan: c.Config):
    mesh = dataclasses.replace(toy_plan, mesh=c.MeshSettings(data=7))
    with pytest.raises(UserError, match="mesh data=7"):
        plan(mesh, "cpu", lambda _: None)
    missing = dataclasses.replace(toy_plan, model=c.ModelSettings("/nowhere"))
    with pytest.raises(UserError, match="/nowhere does not exist"):
        plan(missing, "cpu", lambda _: None)


def test_a_run_that_does_not_fit_exits_with_1(
    toy_plan: c.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """SFT alone, on a device of 1 MiB; with 16 GiB the same command exits with 0."""
    sft = dataclasses.replace(toy_plan, grpo=c.GrpoSettings(steps=0))
    monkeypatch.setattr("spatial_ssrl_jax.config.load.load_config", lambda *_: sft)
    for size, code in ((2**20, 1), (2**34, 0)):
        spec = DeviceSpec(1e12, 1e9, memory=size, network=1e9)
        monkeypatch.setattr(
            "spatial_ssrl_jax.planning.planner.open_topology",
            lambda name, spec=spec: Topology(name, jax.devices("cpu")[:1], spec),
        )
        assert command.main(["--config=toy", "--topology=one"]) == code
    printed = capsys.readouterr().out
    assert (
        "sft_gradients needs" in printed
        and "lower sft.micro_batch_rows, model.attention_chunk" in printed
    )
    assert "sft_apply needs" in printed and "optim.offload=True" in printed
    assert "the largest buffer is [" in printed


def test_the_prompts_of_lengths(toy_plan: c.Config, monkeypatch: pytest.MonkeyPatch, capsys):
    """Their size as given, with as many patches a token as the longest has, and their bucket."""
    data = dataclasses.replace(toy_plan.data, prompt_buckets=(100, 192), patch_buckets=(64, 384))
    config, seen = dataclasses.replace(toy_plan, data=data), []
    monkeypatch.setattr("spatial_ssrl_jax.config.load.load_config", lambda *_: config)

    def planned(_, topology, say, lengths):
        seen.append((lengths.prompt, lengths.bucket))
        raise UserError("enough.")

    monkeypatch.setattr("spatial_ssrl_jax.planning.planner.plan", planned)
    argv = ["--config=toy", "--topology=cpu", "--lengths=mean=9,sigma=0,cap=32,correlation=0"]
    for more in ([], ["--prompt-tokens=90"], ["--prompt-tokens=90", "--prompt-patches=60"]):
        with pytest.raises(UserError, match="enough"):
            command.main([*argv, *more])
    small, large = BatchShape(100, 64), BatchShape(192, 384)
    assert seen == [
        (PromptSize(192, 384), large),
        (PromptSize(90, 180), large),
        (PromptSize(90, 60), small),
    ]
    with pytest.raises(UserError, match="--prompt-patches=0 must be at least 1"):
        command.main([*argv, "--prompt-patches=0"])


def test_prompt_tokens_go_with_lengths(tmp_path: Path):
    config = f"--config={ROOT / 'configs' / 'tiny.py'}"
    with pytest.raises(UserError, match="--prompt-tokens and --prompt-patches go with --lengths"):
        command.main([config, "--topology=cpu", "--prompt-tokens=3"])
    (tmp_path / "none").write_text("many\n")
    with pytest.raises(UserError, match="line 1 of .* is no list of whole numbers"):
        command.main([config, "--topology=cpu", f"--lengths={tmp_path / 'none'}"])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_tiny_run_is_planned_for_a_tpu():
    command = [sys.executable, "-m", "spatial_ssrl_jax.plan", "--config=configs/tiny.py"]
    command += ["--topology=v5e:2x2", "--config.sft.steps=0", "--json"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"] and found["devices"] == 4 and found["step"]["estimated_seconds"] > 0
    assert program(found, "gradients")["collective_bytes"] > 0

"""The best checkpoint: chosen by what the config says, kept beside the newest, and exported."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax import convert
from spatial_ssrl_jax.eval.pretext import PretextEval
from spatial_ssrl_jax.run import training
from spatial_ssrl_jax.run.best import HELDOUT, Best, better, chosen_by
from spatial_ssrl_jax.run.training import train
from tests.run.test_checkpoint import kept
from tests.run.test_training import StopAfter


@pytest.mark.parametrize(
    ("by", "benchmark", "metric"),
    [
        ("auto", "", HELDOUT),
        ("auto", "blink", "benchmark/blink/score"),
        ("heldout", "blink", HELDOUT),
        ("benchmark", "blink", "benchmark/blink/score"),
        ("none", "blink", None),
    ],
)
def test_what_the_best_is_chosen_by(by: str, benchmark: str, metric: str | None):
    config = c.Config("x", checkpoint=c.CheckpointSettings(best=by))
    config = replace(config, eval=replace(config.eval, benchmark=benchmark))
    assert chosen_by(config) == metric


def test_only_a_higher_value_is_better():
    first = Best(2, "a", 0.5)
    assert better(None, 2, {"a": 0.5}, "a") == first
    assert better(first, 4, {"a": 0.5}, "a") is None
    assert better(first, 4, {"a": 0.6}, "a") == Best(4, "a", 0.6)
    assert better(first, 4, {"b": 0.6}, "a") is None  # not measured
    assert better(first, 4, {"b": 0.1}, "b") == Best(4, "b", 0.1)  # another measure: anew
    assert better(None, 4, {"a": 0.6}, None) is None


@pytest.fixture
def rises_and_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out accuracy by step, in place of measuring it: the best is step 2."""
    values = {0: 0.2, 1: 0.3, 2: 0.9, 3: 0.5, 4: 0.9, 5: 0.1}

    def measured(number: int) -> dict:
        row = dict.fromkeys(("accuracy_greedy", "accuracy_sampled", "format", "reward"), 0.0)
        return {"mean": row | {"accuracy_greedy": values[number], "count": 1}}

    measure = training.measure

    def at_step(run, stage, number, *rest):
        monkeypatch.setattr(PretextEval, "measure", lambda *_: measured(number))
        return measure(run, stage, number, *rest)

    monkeypatch.setattr(training, "measure", at_step)


def test_the_best_step_stays_is_named_and_can_be_exported(
    toy_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rises_and_falls, capsys
):
    """Saved at 1 and 2 because they are the best so far, at 3 by `every`, and at the end; stopped
    at 4, where the best is known from the checkpoint alone."""
    config = toy_config(
        sft=c.SftSettings(steps=0),
        grpo=replace(toy_config().grpo, steps=5),
        checkpoint=c.CheckpointSettings(every=3, keep=1),
        eval=c.EvalSettings(examples=1, samples=1, every=1, prompts=8),
        log=c.LogSettings(rollouts_every=0, report_every=100),
    )
    run = tmp_path / "run"
    monkeypatch.setattr(training, "Preemption", StopAfter)
    StopAfter.looks = 4
    assert not train(config, run)
    assert kept(run / "checkpoints") == [2, 4]
    assert train(config, run)
    assert kept(run / "checkpoints") == [2, 5]
    best = json.loads((run / "summary.json").read_text())["best"]
    assert best == {"step": 2, "metric": HELDOUT, "value": 0.9}
    said = capsys.readouterr().out
    assert "step 2 is the best so far: heldout/mean/accuracy_greedy 0.9\n" in said
    assert "step 4 is the best" not in said and "was step 2, kept as" in said
    convert.main(["to-hf", str(run / "checkpoints" / "2"), str(tmp_path / "best")])
    assert (tmp_path / "best" / "model.safetensors").is_file()

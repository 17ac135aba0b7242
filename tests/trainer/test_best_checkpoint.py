"""The best checkpoint: chosen by what the config says, kept beside the newest, and exported."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax import convert, evaluate
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.eval.heldout import HeldoutEval
from spatial_ssrl_jax.eval.predictions import read_predictions
from spatial_ssrl_jax.monitoring.metrics import read_metrics
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT
from spatial_ssrl_jax.trainer import training
from spatial_ssrl_jax.trainer.benchmark_eval import open_eval_benchmark
from spatial_ssrl_jax.trainer.best_checkpoint import HELDOUT, BestCheckpoint, best_metric, improved
from spatial_ssrl_jax.trainer.training import train
from tests.checkpoint.test_manager import kept
from tests.helpers import benchmark_files as files
from tests.trainer.test_training import StopAfter


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
    assert best_metric(config) == metric


def test_only_a_higher_value_is_better():
    first = BestCheckpoint(2, "a", 0.5)
    assert improved(None, 2, {"a": 0.5}, "a") == first
    assert improved(first, 4, {"a": 0.5}, "a") is None
    assert improved(first, 4, {"a": 0.6}, "a") == BestCheckpoint(4, "a", 0.6)
    assert improved(first, 4, {"b": 0.6}, "a") is None  # not measured
    assert improved(first, 4, {"b": 0.1}, "b") == BestCheckpoint(
        4, "b", 0.1
    )  # another measure: anew
    assert improved(None, 4, {"a": 0.6}, None) is None


def benchmark_config(path: Path, name: str, count: int) -> c.Config:
    settings = c.EvalSettings(benchmark=name, benchmark_data=str(path), benchmark_count=count)
    return c.Config("x", eval=settings)


def test_questions_are_taken_evenly_over_the_file(tmp_path: Path):
    path = files.write_mcq(tmp_path, "RealWorldQA.tsv")
    ids = [
        [
            question.id
            for question in open_eval_benchmark(benchmark_config(path, "realworldqa", n)).questions
        ]
        for n in (0, 2, 3, 9)
    ]
    assert ids == [["0", "1", "2", "3"], ["0", "2"], ["0", "1", "2"], ["0", "1", "2", "3"]]
    assert open_eval_benchmark(c.Config("x")) is None


def test_a_benchmark_that_cannot_be_scored_is_refused(tmp_path: Path):
    path = files.write_mmbench(tmp_path, "MMBench_TEST_EN_V11.tsv", answer=False)
    with pytest.raises(UserError, match="are not public, .* choose another eval.benchmark"):
        open_eval_benchmark(benchmark_config(path, "mmbench", 2))
    with pytest.raises(UserError, match="unknown benchmark 'blonk'"):
        open_eval_benchmark(benchmark_config(path, "blonk", 2))


@pytest.fixture
def rises_and_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out accuracy by step, in place of measuring it: the best is step 2."""
    values = {0: 0.2, 1: 0.3, 2: 0.9, 3: 0.5, 4: 0.9, 5: 0.1}

    def measured(number: int) -> dict:
        row = dict.fromkeys(("accuracy_greedy", "accuracy_sampled", "format", "reward"), 0.0)
        return {"mean": row | {"accuracy_greedy": values[number], "count": 1}}

    measure = training.validate

    def at_step(run, stage, number, *rest):
        monkeypatch.setattr(HeldoutEval, "measure", lambda *_: measured(number))
        return measure(run, stage, number, *rest)

    monkeypatch.setattr(training, "validate", at_step)


def assert_benchmark_was_measured(run: Path, capsys) -> None:
    """At the start, at every second step and at the end: metrics, answers and a curve."""
    name = "benchmark/realworldqa/score"
    found = {row["step"]: row[name] for row in read_metrics(run) if name in row}
    assert list(found) == [0, 2, 4, 5] and all(0 <= score <= 100 for score in found.values())
    folders = [run / "benchmark" / f"step_{step:06d}" for step in found]
    for folder, score in zip(folders, found.values(), strict=True):
        records = read_predictions(folder / "predictions.jsonl")
        assert [record.id for record in records] == ["0", "1", "2"]
        assert records[0].question.endswith(FORMAT_PROMPT)
        assert json.loads((folder / "scores.json").read_text())["score"] == round(score, 4)
    report = (run / "report.html").read_text()
    assert "<figcaption>Benchmark score" in report and "<h2>RealWorldQA</h2>" in report
    evaluate.main(["--compare", str(folders[0]), str(folders[-1])])
    assert "RealWorldQA, 3 questions answered by both" in capsys.readouterr().out


def test_the_best_step_stays_is_named_and_can_be_exported(
    toy_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rises_and_falls, capsys
):
    """Saved at 1 and 2 because they are the best so far, at 3 by `every`, and at the end; stopped
    at 4, where the best is known from the checkpoint alone."""
    config = toy_config(
        sft=c.SftSettings(steps=0),
        grpo=replace(toy_config().grpo, steps=5),
        checkpoint=c.CheckpointSettings(every=3, keep=1, best="heldout"),
        eval=c.EvalSettings(
            examples=1,
            samples=1,
            every=1,
            batch_prompts=8,
            benchmark="realworldqa",
            benchmark_data=str(files.WRITERS["realworldqa"](tmp_path)),
            benchmark_count=3,
            benchmark_every=2,
        ),
        log=c.LogSettings(rollouts_every=0, report_every=100),
    )
    run = tmp_path / "run"
    monkeypatch.setattr(training, "Preemption", StopAfter)
    StopAfter.looks = 6  # two before the stage, one a step
    assert not train(config, run)
    assert kept(run / "checkpoints") == [2, 4]
    assert train(config, run)
    assert kept(run / "checkpoints") == [2, 5]
    best = json.loads((run / "summary.json").read_text())["best"]
    assert best == {"step": 2, "metric": HELDOUT, "value": 0.9}
    output = capsys.readouterr().out
    assert "step 2 is the best so far: heldout/mean/accuracy_greedy 0.9\n" in output
    assert "step 4 is the best" not in output and "accuracy_greedy is 2, kept as" in output
    assert_benchmark_was_measured(run, capsys)
    convert.main(["to-hf", str(run / "checkpoints" / "2"), str(tmp_path / "best")])
    assert (tmp_path / "best" / "model.safetensors").is_file()

"""Stored predictions: whole lines, whole questions, and none of another evaluation."""

from pathlib import Path

import pytest

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.eval.prediction_log import PredictionLog
from spatial_ssrl_jax.eval.questions import BenchmarkPrompt, Question, unscored_prediction

ABOUT = {"model": "runs/a", "weights": "1f", "benchmark": "blink"}
QUESTIONS = [Question(str(i), "blink", "all", f"What is {i}?", "A") for i in range(3)]
PROMPTS = [BenchmarkPrompt(question.text) for question in QUESTIONS]


def answers(index: int, samples: int = 2) -> list:
    question, prompt = QUESTIONS[index], PROMPTS[index]
    return [unscored_prediction(question, prompt, f"answer {index}", k + 1) for k in range(samples)]


def test_a_question_counts_when_all_its_answers_are_there(tmp_path: Path):
    """Cut off in the middle of a line, and between two samples of a question."""
    out = tmp_path / "out"
    log = PredictionLog(out, ABOUT)
    assert not log.answered(QUESTIONS, PROMPTS, 2).any() and not out.exists()
    log.add(answers(2))
    log.add(answers(0))
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-9])
    again = PredictionLog(out, ABOUT | {"model": "moved/a"})
    assert again.answered(QUESTIONS, PROMPTS, 2).tolist() == [False, False, True]
    again.add(answers(0))
    assert log.path.read_bytes() == whole


def test_other_answers_are_refused_until_overwritten(tmp_path: Path):
    PredictionLog(tmp_path, ABOUT).add(answers(1))
    with pytest.raises(UserError, match=r"\(benchmark 'blink', not 'x'; weights '1f', not '2e'\)"):
        PredictionLog(tmp_path, ABOUT | {"benchmark": "x", "weights": "2e"})
    for prompts in ([BenchmarkPrompt("another?")] * 3, PROMPTS[:1]):
        with pytest.raises(UserError, match="has an answer to '1', which is not asked now"):
            PredictionLog(tmp_path, ABOUT).answered(QUESTIONS[: len(prompts)], prompts, 2)
    (tmp_path / "mine.txt").write_text("mine")
    assert PredictionLog(tmp_path, {"weights": "2e"}, overwrite=True).predictions == []
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "asked.json").write_text("{")
    with pytest.raises(UserError, match="asked.json is not valid JSON .*: choose another --out"):
        PredictionLog(tmp_path, ABOUT)

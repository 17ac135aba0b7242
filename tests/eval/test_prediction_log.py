"""What is kept of answers: whole lines, whole questions, and nothing of another evaluation."""

from pathlib import Path

import pytest

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.eval.prediction_log import PredictionLog
from spatial_ssrl_jax.eval.questions import BenchmarkPrompt, Question, unscored_prediction

ABOUT = {"model": "runs/a", "weights": "1f", "benchmark": "blink"}
QUESTIONS = [Question(str(i), "blink", "all", f"What is {i}?", "A") for i in range(3)]
ASKED = [BenchmarkPrompt(question.text) for question in QUESTIONS]


def answers(place: int, samples: int = 2) -> list:
    question, asked = QUESTIONS[place], ASKED[place]
    return [unscored_prediction(question, asked, f"said {place}", k + 1) for k in range(samples)]


def test_a_question_counts_when_all_its_answers_are_there(tmp_path: Path):
    """Cut off in the middle of a line, and between two samples of a question."""
    out = tmp_path / "out"
    journal = PredictionLog(out, ABOUT)
    assert not journal.answered(QUESTIONS, ASKED, 2).any() and not out.exists()
    journal.add(answers(2))
    journal.add(answers(0))
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[:-9])
    again = PredictionLog(out, ABOUT | {"model": "moved/a"})
    assert again.answered(QUESTIONS, ASKED, 2).tolist() == [False, False, True]
    again.add(answers(0))
    assert journal.path.read_bytes() == whole


def test_other_answers_are_refused_until_overwritten(tmp_path: Path):
    PredictionLog(tmp_path, ABOUT).add(answers(1))
    with pytest.raises(UserError, match=r"\(benchmark 'blink', not 'x'; weights '1f', not '2e'\)"):
        PredictionLog(tmp_path, ABOUT | {"benchmark": "x", "weights": "2e"})
    for asked in ([BenchmarkPrompt("another?")] * 3, ASKED[:1]):
        with pytest.raises(UserError, match="has an answer to '1', which is not asked now"):
            PredictionLog(tmp_path, ABOUT).answered(QUESTIONS[: len(asked)], asked, 2)
    (tmp_path / "mine.txt").write_text("mine")
    assert PredictionLog(tmp_path, {"weights": "2e"}, overwrite=True).records == []
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "asked.json").write_text("{")
    with pytest.raises(UserError, match="asked.json is damaged .*: choose another --out"):
        PredictionLog(tmp_path, ABOUT)

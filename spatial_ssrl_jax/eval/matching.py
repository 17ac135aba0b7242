"""Puts the answers of other tools to a benchmark's questions, which each row must agree with."""

from collections.abc import Callable, Sequence
from pathlib import Path

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.eval.benchmarks.registry import judge_prediction, open_benchmark
from spatial_ssrl_jax.eval.other_tools import LMMS, ToolAnswer, ToolAnswers, plain
from spatial_ssrl_jax.eval.questions import (
    BenchmarkPrompt,
    Prediction,
    Question,
    Target,
    unscored_prediction,
)

_LONGEST = 80  # characters of a question in an error


def tool_predictions(
    answers: ToolAnswers,
    data: Path | None,
    allow_missing: bool,
    allow_outside_paths: bool,
    say: Callable[[str], None],
) -> list[Prediction]:
    """The predictions in a file of another tool, in the order of the questions.

    Args:
      answers: the file's rows.
      data: the benchmark's question file or its folder; None takes the questions from the rows.
      allow_missing: leave out questions without an answer, and rows that are no questions.
      allow_outside_paths: see `open_benchmark`.
      say: receives how many rows were used, and how many were not and why.

    Raises:
      UserError: the rows are of other questions, two answer one question differently, or, unless
        `allow_missing`, a question has no answer.
    """
    if data is None:
        questions = _own_questions(answers, allow_missing)
    else:
        opened = open_benchmark(
            answers.spec.name, data, allow_missing, allow_outside_paths, media=False
        )
        questions = _of_task(opened.questions, answers)
    found, extra, repeated = _by_question(answers, questions)
    missing = [question for question in questions if question.id not in found]
    if not found or missing and not allow_missing:
        rest = "; --allow-missing scores the rest" if found else ""
        raise UserError(
            f"{answers.path} answers {len(found)} of the {len(questions)} questions of "
            f"{data or answers.spec.title} (not {missing[0].id}): give all answers{rest}."
        )
    counts = {
        "rows left out, of no question": extra,
        "rows given twice": repeated,
        "questions left out, without an answer": len(missing),
        **answers.counts,
    }
    used = f"{answers.tool}'s answers to {len(found)} questions of {answers.spec.title}"
    notes = [f"{words}: {count}" for words, count in counts.items() if count]
    say("; ".join([f"{answers.path}: {used}", *notes]))
    return [p for q in questions if q.id in found for p in _predictions(answers, q, found[q.id])]


def _own_questions(answers: ToolAnswers, allow_missing: bool) -> list[Question]:
    """The questions that the rows hold themselves."""
    whole = [row.question for row in answers.rows if row.question is not None]
    if not whole or len(whole) < len(answers.rows) and not allow_missing:
        fix = f"give the question file of {answers.spec.title} as --data."
        if answers.bad_rows:
            raise UserError(f"{answers.bad_rows[0].rstrip('.')}; or {fix}")
        raise UserError(f"{answers.path} holds answers without their questions: {fix}")
    return list({question.id: question for question in whole}.values())


def _of_task(questions: Sequence[Question], answers: ToolAnswers) -> list[Question]:
    """The questions of the category that is a task of its own, as BLINK's are; else all."""
    category = answers.task.partition(plain(answers.spec.name))[2]
    return [q for q in questions if plain(q.category) == category] or list(questions)


def _by_question(
    answers: ToolAnswers, questions: Sequence[Question]
) -> tuple[dict[str, ToolAnswer], int, int]:
    """The row of each question by its id, how many have no question, and how many come twice."""
    found: dict[str, ToolAnswer] = {}
    extra = repeated = 0
    for row, question in zip(answers.rows, _places(answers, questions), strict=True):
        if question is None:
            extra += 1
            continue
        first = found.setdefault(question.id, row)
        samples = len(next(iter(found.values())).responses)
        if len(row.responses) != samples:
            raise UserError(
                f"{row.name} has {len(row.responses)} samples and the first {samples}: copy the "
                "file again, or leave the line out."
            )
        if first.responses != row.responses:
            raise UserError(
                f"{row.name} answers question {question.id} as {first.name} does, in other words: "
                "keep one of them."
            )
        repeated += first is not row
    return found, extra, repeated


def _places(answers: ToolAnswers, questions: Sequence[Question]) -> list[Question | None]:
    """The question of each row, by its id, or by its number where ids are of another kind.

    Raises:
      UserError: neither way all rows agree with their questions; it names the first that does not.
    """
    by_key = {str(q.meta["qid"]): q for q in questions if "qid" in q.meta}
    by_key |= {question.id: question for question in questions}
    rows, numbered = answers.rows, dict(enumerate(questions))
    by_id = [next((by_key[key] for key in row.keys if key in by_key), None) for row in rows]
    ways = [places for places in (by_id, [numbered.get(row.number) for row in rows]) if any(places)]
    wrong = None
    for places in ways:
        pairs = [(row, q) for row, q in zip(rows, places, strict=True) if q is not None]
        other = next((pair for pair in pairs if not _agree(answers, *pair)), None)
        if other is None:
            return places
        wrong = wrong or other
    if wrong is None:
        return [None] * len(rows)
    row, question = wrong
    raise UserError(
        f"{row.name} asks {_quoted(_asked(row))}, right answer {_quoted(row.target)}, and question "
        f"{question.id} is {_quoted(question.text)}, right answer {_quoted(question.target)}: "
        f"give the question file of {answers.spec.title} that was asked there as --data."
    )


def _agree(answers: ToolAnswers, row: ToolAnswer, question: Question) -> bool:
    """Whether a row has the question's text and right answer, as far as it has any."""
    text, asked = _words(question.text), _words(_asked(row))
    if asked and not (asked == text if row.question else text in asked):
        return False
    if not row.target or not question.target:
        return True
    right = judge_prediction(_predictions(answers, question, row, (row.target,))[0])
    return right.extracted is None or right.score == 1


def _asked(row: ToolAnswer) -> str:
    return row.question.text if row.question else row.asked


def _quoted(value: Target) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _words(text: str) -> str:
    return plain(text.replace("<image>", ""))


def _predictions(
    answers: ToolAnswers,
    question: Question,
    row: ToolAnswer,
    responses: Sequence[str] | None = None,
) -> list[Prediction]:
    """A prediction for each response of a row; VLMEvalKit does not write its prompts."""
    options = [f"{letter}. {text}" for letter, text in question.options.items()]
    known = answers.tool == LMMS and row.asked
    prompt = BenchmarkPrompt(row.asked if known else "\n".join([question.text, *options]))
    texts = row.responses if responses is None else responses
    return [
        unscored_prediction(question, prompt, text, number if len(texts) > 1 else None)
        for number, text in enumerate(texts, 1)
    ]

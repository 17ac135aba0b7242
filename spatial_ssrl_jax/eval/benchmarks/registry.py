"""The fourteen benchmarks by name: opening their files, making prompts, scoring predictions."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.eval.benchmarks import charts_and_text, mcq, spatial457, vsi_bench
from spatial_ssrl_jax.eval.benchmarks.hallusionbench import HALLUSIONBENCH
from spatial_ssrl_jax.eval.benchmarks.pretext import PRETEXT
from spatial_ssrl_jax.eval.benchmarks.prompts import Style
from spatial_ssrl_jax.eval.benchmarks.qspatial import QSPATIAL_PLUS
from spatial_ssrl_jax.eval.benchmarks.question_files import (
    FIX_HINT,
    BadQuestionRow,
    QuestionRow,
    read_rows,
)
from spatial_ssrl_jax.eval.benchmarks.spec import BenchmarkSpec
from spatial_ssrl_jax.eval.benchmarks.viewspatial import VIEWSPATIAL
from spatial_ssrl_jax.eval.benchmarks.whatsup import WHATSUP
from spatial_ssrl_jax.eval.questions import SAMPLE, BenchmarkPrompt, Prediction, Question
from spatial_ssrl_jax.eval.scoring.published import GENERAL, SPATIAL
from spatial_ssrl_jax.eval.scoring.scores import Scores, summarise

SPECS = {
    spec.name: spec
    for spec in (
        spatial457.SPATIAL457,
        mcq.SRBENCH_3D,
        mcq.SPATIALEVAL,
        QSPATIAL_PLUS,
        WHATSUP,
        VIEWSPATIAL,
        vsi_bench.VSI_BENCH,
        mcq.MMBENCH,
        mcq.BLINK,
        HALLUSIONBENCH,
        mcq.REALWORLDQA,
        charts_and_text.OCRBENCH,
        charts_and_text.CHARTQA,
        mcq.SEEDBENCH2_PLUS,
    )
}
# The fourteen, and the pretext tasks, which have no file.
SCORED = SPECS | {PRETEXT.name: PRETEXT}
# Benchmarks that the released code asks otherwise: the paper's variant.
AS_RELEASED = {
    spec.name: spec for spec in (spatial457.AS_RELEASED, vsi_bench.AS_RELEASED, *mcq.AS_RELEASED)
}
SETS = {"spatial": SPATIAL, "general": GENERAL, "all": SPATIAL + GENERAL}


@dataclass(frozen=True)
class Benchmark:
    """An opened benchmark.

    Attributes:
      spec: its files, prompts, metric and published settings.
      questions: in the order of the file; their images are not read yet.
      left_out: a reason for each row that was left out.
    """

    spec: BenchmarkSpec
    questions: tuple[Question, ...]
    left_out: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.spec.name

    def prompt(self, question: Question, style: Style = "direct") -> BenchmarkPrompt:
        """The question's prompt in a style."""
        return self.spec.ask(question, style)

    def score(self, predictions: Sequence[Prediction]) -> tuple[list[Prediction], Scores]:
        """See `score_predictions`."""
        return score_predictions(predictions)


def names_of(benchmark: str) -> tuple[str, ...]:
    """A benchmark's name, or the names of a set; raises `UserError` on an unknown one."""
    if benchmark in SETS:
        return SETS[benchmark]
    if benchmark not in SPECS:
        known = ", ".join([*SETS, *SPECS])
        raise UserError(f"unknown benchmark {benchmark!r}: choose among {known}.")
    return (benchmark,)


def open_benchmark(
    name: str,
    path: Path,
    allow_missing: bool = False,
    allow_outside_paths: bool = False,
    as_released: bool = False,
    media: bool = True,
) -> Benchmark:
    """Reads a benchmark's questions.

    Args:
      name: one of `SPECS`.
      path: its question file, or a folder in which its files are under their published names, or
        in a folder of its own each.
      allow_missing: leave out rows whose image, video or answer is missing.
      allow_outside_paths: let paths in rows leave the folder `path`, or that of the file `path`.
      as_released: ask to the letter as the released code does, see `AS_RELEASED`.
      media: whether the questions have their images and videos; without, none are looked for.

    Raises:
      UserError: no such file, a file of another benchmark, a damaged one, an id that occurs twice,
        or, unless `allow_missing`, a row that cannot be asked or scored.
    """
    (name,) = names_of(name)
    spec = AS_RELEASED.get(name, SPECS[name]) if as_released else SPECS[name]
    if spec.parse is None:
        raise ValueError(f"the questions of {name} are in no file")
    found: list[tuple[QuestionRow, Question]] = []
    left_out: list[str] = []
    path = Path(path)
    inside = None if allow_outside_paths else path if path.is_dir() else path.parent
    for row in _rows(spec, _files(spec, path, allow_missing), inside):
        try:
            question = spec.parse(replace(row, media=media))
        except BadQuestionRow as reason:
            if not allow_missing:
                raise
            left_out.append(str(reason))
            continue
        if question is not None:
            found.append((row, question))
    questions, unanswered = _check_answers(found, allow_missing)
    left_out += unanswered
    _check_ids([question.id for _, question in questions], [row.name for row, _ in questions])
    if not questions:
        reason = f" (the first: {left_out[0].rstrip('.')})" if left_out else ""
        raise UserError(f"{path} holds no question that can be asked{reason}.")
    return Benchmark(spec, tuple(question for _, question in questions), tuple(left_out))


def _files(spec: BenchmarkSpec, path: Path, allow_missing: bool) -> list[Path]:
    if path.is_file():
        name = path.name.lower()
        other = [s for s in SPECS.values() if s.name != spec.name and name in s.file_names()]
        if other:
            raise UserError(
                f"{path} is a file of {other[0].title}, not of {spec.title}: give --benchmark="
                f"{other[0].name} or another file."
            )
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file or folder.")
    found = spec.of_folder(path)
    for file, names in zip(found, spec.files, strict=True):
        if file is None and (not allow_missing or not any(found)):
            raise UserError(
                f"{path} has no file of {spec.title}: put {' or '.join(names)} there, or give the "
                "file itself."
            )
    return [file for file in found if file is not None]


def _rows(spec: BenchmarkSpec, files: list[Path], inside: Path | None) -> Iterator[QuestionRow]:
    for file in files:
        rows = read_rows(file, inside)
        columns = set(rows[0].values)
        lacking = [sorted(set(needed) - columns) for needed in spec.columns]
        if all(lacking):
            fewest = min(lacking, key=len)
            raise UserError(
                f"{file} is no file of {spec.title}: its rows have no {', '.join(fewest)}."
            )
        yield from rows


def _check_answers(
    questions: list[tuple[QuestionRow, Question]], allow_missing: bool
) -> tuple[list[tuple[QuestionRow, Question]], list[str]]:
    """The questions with an answer, and why others are left out; all where none has an answer, as
    in a split whose answers only a server has."""
    reasons = [
        f"{row.name} has no answer: {FIX_HINT}."
        for row, question in questions
        if question.target is None
    ]
    if len(reasons) == len(questions):
        return questions, []
    if reasons and not allow_missing:
        raise BadQuestionRow(reasons[0])
    return [pair for pair in questions if pair[1].target is not None], reasons


def _check_ids(ids: Sequence[str], names: Sequence[str]) -> None:
    twice = next((id for id, times in Counter(ids).items() if times > 1), None)
    if twice is not None:
        rows = [name for id, name in zip(ids, names, strict=True) if id == twice]
        raise UserError(
            f"the id {twice!r} occurs {len(rows)} times ({rows[0]}, {rows[1]}, …): keep one."
        )


def score_predictions(predictions: Sequence[Prediction]) -> tuple[list[Prediction], Scores]:
    """Scores predictions of one benchmark; no other file is needed.

    Returns:
      The predictions with `extracted`, `parsed` and `score`, and the benchmark's scores.

    Raises:
      UserError: there is none, they are of several benchmarks or of an unknown one, an id occurs
        twice, or a target is missing or not of the benchmark's kind.
    """
    benchmarks = sorted({prediction.benchmark for prediction in predictions})
    if len(benchmarks) != 1:
        found = ", ".join(benchmarks) or "none"
        raise UserError(
            f"expected predictions of one benchmark and found {found}: score them apart."
        )
    if benchmarks[0] not in SCORED:
        known = ", ".join(SCORED)
        raise UserError(f"unknown benchmark {benchmarks[0]!r}: choose among {known}.")
    ids = [
        f"{prediction.id}, sample {prediction.meta[SAMPLE]}"
        if SAMPLE in prediction.meta
        else prediction.id
        for prediction in predictions
    ]
    _check_ids(ids, [f"line {number}" for number in range(1, len(ids) + 1)])
    for prediction in predictions:
        if not prediction.target:
            raise BadQuestionRow(f"{prediction.id} has no target: {FIX_HINT}.")
    scored = [judge_prediction(prediction) for prediction in predictions]
    return scored, summarise(benchmarks[0], SCORED[benchmarks[0]].metric, scored)


def for_server(predictions: Sequence[Prediction]) -> bool:
    """Whether only a benchmark's server can score the predictions."""
    private = {name for name, spec in SPECS.items() if not spec.public}
    return all(p.target is None and p.benchmark in private for p in predictions)


def judge_prediction(prediction: Prediction) -> Prediction:
    """The prediction with `extracted`, `parsed` and `score`; unchanged where no target is known."""
    if not prediction.target:
        return prediction
    judgement = SCORED[prediction.benchmark].metric.judge(prediction)
    return replace(
        prediction,
        extracted=judgement.extracted,
        parsed=judgement.extracted is not None,
        score=judgement.score,
    )

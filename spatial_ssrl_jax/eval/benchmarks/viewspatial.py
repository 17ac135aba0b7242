"""ViewSpatial-Bench: directions from the camera's and from a person's view, 1 to 32 images."""

from spatial_ssrl_jax.eval.benchmarks import prompts
from spatial_ssrl_jax.eval.benchmarks.mcq import check_target, judge_choice
from spatial_ssrl_jax.eval.benchmarks.prompts import Style
from spatial_ssrl_jax.eval.benchmarks.question_files import QuestionRow
from spatial_ssrl_jax.eval.benchmarks.spec import BenchmarkSpec, area
from spatial_ssrl_jax.eval.questions import BenchmarkPrompt, Question
from spatial_ssrl_jax.eval.scoring import extract
from spatial_ssrl_jax.eval.scoring.scores import Metric
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT

# Category names: the file's, and the paper's.
_CATEGORIES = {
    "Camera perspective - Relative Direction": "Camera-RelativeDirection",
    "Camera perspective - Object View Orientation": "Camera-ObjectView",
    "Person perspective - Object View Orientation": "Person-ObjectView",
    "Person perspective - Relative Direction": "Person-RelativeDirection",
    "Person perspective - Scene Simulation Relative Direction": "Person-SceneSimulation",
}


def _parse(row: QuestionRow) -> Question:
    """A row of the original JSON, or of VLMEvalKit's TSV, which calls the choices candidates."""
    choices, kind = _choices(row), row.text("question_type")
    options = extract.options_in(choices)
    return Question(
        id=str(row.get("index")).strip() or str(row.number),
        benchmark="viewspatial",
        category=_CATEGORIES.get(kind, kind),
        text=row.words("question"),
        target=check_target(row, row.text("answer")[0], options),
        options=options,
        images=row.images(),
        meta={"choices": choices},
    )


def _choices(row: QuestionRow) -> str:
    """Options with their letters, one a line; a TSV may write them as a Python list."""
    column = "choices" if row.get("choices") else "candidates"
    return "\n".join(row.items(column))


def ask(question: Question, style: Style) -> BenchmarkPrompt:
    text = f"{question.text}\n{question.meta['choices']}"
    if style == "direct":
        return BenchmarkPrompt(text + prompts.VIEWSPATIAL_DIRECT, question.images)
    return BenchmarkPrompt(text + prompts.LETTER_LAST + FORMAT_PROMPT, question.images)


VIEWSPATIAL = BenchmarkSpec(
    name="viewspatial",
    title="ViewSpatial",
    files=(("ViewSpatial-Bench.json", "ViewSpatialBench.tsv"),),
    columns=(
        ("question_type", "image_path", "question", "choices", "answer"),
        ("index", "question_type", "question", "candidates", "answer"),
    ),
    parse=_parse,
    ask=ask,
    metric=Metric(judge_choice),
    pixels=(area(256), area(1280)),  # not the 280×420 that the released script forces
    new_tokens=4096,
)

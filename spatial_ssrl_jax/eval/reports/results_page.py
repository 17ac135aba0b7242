"""`results.html`: scores with the paper's rows, categories, and right and wrong answers."""

import html
from collections.abc import Sequence
from pathlib import Path

from spatial_ssrl_jax.common.html import filters, page, table
from spatial_ssrl_jax.eval.benchmarks.pretext import CHANCE
from spatial_ssrl_jax.eval.benchmarks.registry import SCORED
from spatial_ssrl_jax.eval.questions import Prediction, score_of
from spatial_ssrl_jax.eval.reports import gallery
from spatial_ssrl_jax.eval.reports.gallery import Bar, PageImages, Questions
from spatial_ssrl_jax.eval.scoring.published import VARIANT, blocks, comparable, published
from spatial_ssrl_jax.eval.scoring.scores import Scores

RESULTS = "results.html"
RIGHT, PARTLY, WRONG, UNPARSED = "right", "partly right", "wrong", "unparsed"

Result = tuple[Sequence[Prediction], Scores]  # scored predictions of a benchmark, and its scores


def write_results_page(
    path: Path,
    results: Sequence[Result],
    questions: Questions | None = None,
) -> None:
    """Writes a self-contained page.

    Args:
      path: the page.
      results: of each benchmark.
      questions: with the images; None leaves images out.
    """
    found = [scores for _, scores in results]
    one = found[0].benchmark if len(found) == 1 else None
    title = SCORED[one].title if one else f"Results of {len(found)} benchmarks"
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if not one:
        titles = {name: spec.title for name, spec in SCORED.items()}
        ours = {scores.benchmark: comparable(scores) for scores in found}
        parts += [table(head, rows) for head, *rows in blocks(ours, titles)]
    for scores in found:
        parts += [] if one else [f"<h2>{html.escape(SCORED[scores.benchmark].title)}</h2>"]
        parts.append(_scores(scores))
    predictions = [prediction for part, _ in results for prediction in part]
    parts.append(_answers(predictions, PageImages(questions or {})))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(title, "".join(parts), ("filter.js",)), "utf-8")


def outcome(prediction: Prediction) -> str:
    """The outcome of a scored response, in a word or two."""
    if not prediction.parsed:
        return UNPARSED
    return {1.0: RIGHT, 0.0: WRONG}.get(score_of(prediction), PARTLY)


def _scores(scores: Scores) -> str:
    """HTML of a benchmark's scores, the paper's rows, and the categories."""
    low, high = scores.ci95
    shown = {
        "score": f"{scores.score:.2f}",
        "95 % interval": f"{low:.2f} to {high:.2f}",
        "questions": f"{scores.count:,}",
        "without a readable answer (wrong)": f"{scores.unparsed:,}",
    }
    shown |= {
        name.replace("_", " "): f"{value:.2f}"
        for name, value in scores.extra.items()
        if not name.startswith(CHANCE)
    }
    categories = [
        Bar(
            name,
            found["score"],
            f"{found['score']:.2f} of {found['count']:,}{_chance(scores, name)}",
        )
        for name, found in scores.categories.items()
    ]
    parts = [gallery.tiles(shown), _published(scores)]
    if len(categories) > 1:
        parts += [
            "<h3>Categories, each with its number of questions</h3>",
            gallery.bars(categories),
        ]
    return "".join(parts)


def _chance(scores: Scores, category: str) -> str:
    chance = scores.extra.get(CHANCE + category)
    return "" if chance is None else f", chance {chance:.2f}"


def _published(scores: Scores) -> str:
    rows = [Bar(name, value, f"{value:.2f}") for name, value in published(scores.benchmark).items()]
    if not rows:
        return ""
    value, variant = comparable(scores), VARIANT.get(scores.benchmark)
    interval = None if variant else scores.ci95
    rows.append(Bar("this model", value, f"{value:.2f}", interval, ours=True))
    notes = []
    if any(row.name.endswith("✗") for row in rows):
        notes.append("✗: asked to answer directly.")
    if interval:
        notes.append("The mark is the 95 % interval.")
    if variant:
        notes.append(f"The score {variant!r} above is computed as the paper's.")
    note = f'<p class="soft">{html.escape(" ".join(notes))}</p>' if notes else ""
    return f"<h3>With the paper's rows</h3>{gallery.bars(rows)}{note}"


def _answers(predictions: Sequence[Prediction], images: PageImages) -> str:
    """The browser of answers, spread evenly over benchmarks, categories and outcomes."""
    kinds = [(p.benchmark, p.category, outcome(p)) for p in predictions]
    chosen = gallery.spread(kinds, gallery.SHOWN)
    articles = {index: _article(predictions[index], images) for index in chosen}
    benchmarks = list(dict.fromkeys(prediction.benchmark for prediction in predictions))
    choices = {"benchmark": benchmarks} if len(benchmarks) > 1 else {}
    choices["category"] = sorted({predictions[index].category for index in chosen})
    outcomes = {kinds[index][2] for index in chosen}
    choices["answer"] = [word for word in (RIGHT, PARTLY, WRONG, UNPARSED) if word in outcomes]
    note = images.note()
    if len(chosen) < len(predictions):
        few = (
            f"{len(chosen):,} of {len(predictions):,} questions, evenly over categories and over "
            "right and wrong answers; predictions.jsonl has all."
        )
        note = f"{few} {note}"
    return (
        f'<h2>Answers</h2><p class="soft">{html.escape(note)}</p>{filters(choices)}'
        f"{''.join(articles[index] for index in sorted(articles))}"
    )


def _article(prediction: Prediction, images: PageImages) -> str:
    result = outcome(prediction)
    data = {"benchmark": prediction.benchmark, "category": prediction.category, "answer": result}
    fields = " ".join(f'data-{name}="{html.escape(value)}"' for name, value in data.items())
    words = result if result != PARTLY else f"{100 * score_of(prediction):.0f} % right"
    return (
        f"<article {fields}><h3>{html.escape(gallery.title_of(prediction))}</h3>"
        f"{images.of(prediction)}"
        f"<pre>{html.escape(gallery.shortened(prediction.question))}</pre>"
        f"{gallery.answer('right' if result == RIGHT else 'wrong', words, prediction)}</article>"
    )

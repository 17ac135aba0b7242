"""`results.html`: scores beside the paper's rows, categories, and right and wrong answers."""

import html
from collections.abc import Sequence
from pathlib import Path

from spatial_ssrl_jax.common.html import filters, page, table
from spatial_ssrl_jax.eval.benchmarks.pretext import CHANCE
from spatial_ssrl_jax.eval.benchmarks.registry import SCORED
from spatial_ssrl_jax.eval.questions import Prediction
from spatial_ssrl_jax.eval.reports import gallery
from spatial_ssrl_jax.eval.reports.gallery import Bar, Pictures, Questions
from spatial_ssrl_jax.eval.scoring.published import VARIANT, blocks, comparable, published
from spatial_ssrl_jax.eval.scoring.scores import Scores

RESULTS = "results.html"
RIGHT, PARTLY, WRONG, UNPARSED = "right", "partly right", "wrong", "unparsed"

Result = tuple[Sequence[Prediction], Scores]  # scored records of a benchmark, and its scores


def write_results_page(
    path: Path,
    results: Sequence[Result],
    questions: Questions | None = None,
) -> None:
    """Writes a page that needs no other file.

    Args:
      path: the page.
      results: of each benchmark.
      questions: where the images are; None leaves them out.
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
        parts.append(_figures(scores))
    records = [record for part, _ in results for record in part]
    parts.append(_answers(records, Pictures(questions or {})))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(title, "".join(parts), ("filter.js",)), "utf-8")


def verdict(record: Prediction) -> str:
    """How a scored response was judged, in a word or two."""
    if not record.parsed:
        return UNPARSED
    return {1.0: RIGHT, 0.0: WRONG}.get(record.score, PARTLY)


def _figures(scores: Scores) -> str:
    """The score, the paper's rows beside it, and the categories."""
    low, high = scores.ci95
    figures = {
        "score": f"{scores.score:.2f}",
        "95 % interval": f"{low:.2f} to {high:.2f}",
        "questions": f"{scores.count:,}",
        "without a readable answer (wrong)": f"{scores.unparsed:,}",
    }
    figures |= {
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
    parts = [gallery.tiles(figures), _beside_the_paper(scores)]
    if len(categories) > 1:
        parts += [
            "<h3>Categories, each with its number of questions</h3>",
            gallery.bars(categories),
        ]
    return "".join(parts)


def _chance(scores: Scores, category: str) -> str:
    chance = scores.extra.get(CHANCE + category)
    return "" if chance is None else f", chance {chance:.2f}"


def _beside_the_paper(scores: Scores) -> str:
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
        notes.append(f"By the figure {variant!r} above, which is computed as the paper's is.")
    note = f'<p class="soft">{html.escape(" ".join(notes))}</p>' if notes else ""
    return f"<h3>Beside the paper's rows</h3>{gallery.bars(rows)}{note}"


def _answers(records: Sequence[Prediction], pictures: Pictures) -> str:
    """The browser of answers: an even spread over benchmarks, categories and verdicts."""
    kinds = [(r.benchmark, r.category, verdict(r)) for r in records]
    chosen = gallery.spread(kinds, gallery.SHOWN)
    articles = {place: _article(records[place], pictures) for place in chosen}
    benchmarks = list(dict.fromkeys(record.benchmark for record in records))
    choices = {"benchmark": benchmarks} if len(benchmarks) > 1 else {}
    choices["category"] = sorted({records[place].category for place in chosen})
    there = {kinds[place][2] for place in chosen}
    choices["answer"] = [word for word in (RIGHT, PARTLY, WRONG, UNPARSED) if word in there]
    note = pictures.note()
    if len(chosen) < len(records):
        few = (
            f"{len(chosen):,} of {len(records):,} questions, evenly over categories and over "
            "right and wrong answers; predictions.jsonl has all."
        )
        note = f"{few} {note}"
    return (
        f'<h2>Answers</h2><p class="soft">{html.escape(note)}</p>{filters(choices)}'
        f"{''.join(articles[place] for place in sorted(articles))}"
    )


def _article(record: Prediction, pictures: Pictures) -> str:
    judged = verdict(record)
    data = {"benchmark": record.benchmark, "category": record.category, "answer": judged}
    fields = " ".join(f'data-{name}="{html.escape(value)}"' for name, value in data.items())
    words = judged if judged != PARTLY else f"{100 * record.score:.0f} % right"
    return (
        f"<article {fields}><h3>{html.escape(gallery.title_of(record))}</h3>"
        f"{pictures.of(record)}"
        f"<pre>{html.escape(gallery.shortened(record.question))}</pre>"
        f"{gallery.answer('right' if judged == RIGHT else 'wrong', words, record)}</article>"
    )

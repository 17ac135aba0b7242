"""Reports of a comparison: text for the terminal, and `comparison.html` with what changed."""

import html
from collections import Counter
from pathlib import Path

from spatial_ssrl_jax.common.html import filters, page, table
from spatial_ssrl_jax.eval.benchmarks.registry import SCORED
from spatial_ssrl_jax.eval.questions import Prediction
from spatial_ssrl_jax.eval.reports import gallery
from spatial_ssrl_jax.eval.reports.gallery import Bar, PageImages, Questions
from spatial_ssrl_jax.eval.reports.results_page import RIGHT, outcome
from spatial_ssrl_jax.eval.scoring.compare import CHANGES, GAINED, LOST, Comparison

COMPARISON, COMPARED = "comparison.html", "comparison.json"
_MAX_NAMED = 8  # changed questions in the terminal's text


def write_comparison_page(
    path: Path,
    found: Comparison,
    names: tuple[str, str],
    questions: Questions | None = None,
) -> None:
    """Writes a self-contained page.

    Args:
      path: the page.
      found: the comparison.
      names: paths of A and B.
      questions: with the images; None leaves images out.
    """
    title = f"{SCORED[found.scores[0].benchmark].title}: B against A"
    categories = [
        (name, f"{row['a']:.2f}", f"{row['b']:.2f}", f"{row['difference']:+.2f}", row["count"])
        for name, row in found.categories.items()
    ]
    body = (
        f"<h1>{html.escape(title)}</h1>"
        f'<p class="soft">A: {html.escape(names[0])}<br>B: {html.escape(names[1])}</p>'
        f"{_scores(found)}<h2>Categories</h2>"
        f"{table(('category', 'A', 'B', 'B − A', 'questions'), categories)}"
        f"{_changed(found, PageImages(questions or {}))}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(title, body, ("filter.js",)), "utf-8")


def in_words(found: Comparison) -> str:
    """The difference, its interval and its significance, in a sentence."""
    low, high = found.ci95
    text = f"B − A: {found.difference:+.2f} [{low:+.2f}, {high:+.2f}] (95 %, paired bootstrap); "
    if found.p_value is None:
        return text + f"no McNemar test, for {found.no_test}."
    return text + f"McNemar's exact test: p = {found.p_value:.3g}."


def as_text(found: Comparison, names: tuple[str, str]) -> str:
    """Both scores, their difference and its significance, the categories, and what changed."""
    a, b = found.scores
    lines = [f"{SCORED[a.benchmark].title}, {a.count} questions answered by both"]
    for letter, name, scores in zip("AB", names, (a, b), strict=True):
        low, high = scores.ci95
        lines.append(f"  {letter}  {scores.score:6.2f} [{low:.2f}, {high:.2f}]  {name}")
    lines += [in_words(found), "categories: A, B, B − A"]
    width = max(map(len, found.categories))
    lines += [
        f"  {name:{width}}  {row['a']:6.2f}  {row['b']:6.2f}  {row['difference']:+7.2f}  "
        f"of {row['count']}"
        for name, row in found.categories.items()
    ]
    counts = Counter(found.changes)
    lines.append(", ".join(f"{counts[change]} {change}" for change in CHANGES if counts[change]))
    for change in (GAINED, LOST):
        ids = found.ids(change)
        more = f", … ({len(ids) - _MAX_NAMED} more: --out, --json)" if len(ids) > _MAX_NAMED else ""
        lines += [f"  {change}: {', '.join(ids[:_MAX_NAMED])}{more}"] if ids else []
    return "\n".join(lines)


def _scores(found: Comparison) -> str:
    a, b = found.scores
    rows = [
        Bar(name, scores.score, f"{scores.score:.2f}", scores.ci95, ours=name == "B")
        for name, scores in (("A", a), ("B", b))
    ]
    counts = Counter(found.changes)
    shown = {"B − A": f"{found.difference:+.2f}"}
    if found.p_value is not None:
        shown["McNemar's p"] = f"{found.p_value:.3g}"
    shown |= {change: f"{counts[change]:,}" for change in CHANGES if counts[change]}
    return f"{gallery.tiles(shown)}{gallery.bars(rows)}<p>{html.escape(in_words(found))}</p>"


def _changed(found: Comparison, images: PageImages) -> str:
    """The browser of questions that B answers better or worse than A."""
    changed = [i for i, change in enumerate(found.changes) if change in (GAINED, LOST)]
    if not changed:
        return "<h2>Changed answers</h2><p>No question is scored differently.</p>"
    kinds = [(found.a[i].category, found.changes[i]) for i in changed]
    chosen = [changed[i] for i in gallery.spread(kinds, gallery.SHOWN // 2)]
    articles = {i: _article(found.a[i], found.b[i], found.changes[i], images) for i in chosen}
    note = images.note()
    if len(chosen) < len(changed):
        few = f"{len(chosen):,} of {len(changed):,}; comparison.json names all."
        note = f"{few} {note}"
    choices = {
        "category": sorted({found.a[i].category for i in chosen}),
        "change": [word for word in (GAINED, LOST) if word in set(found.changes)],
    }
    return (
        f'<h2>Changed answers</h2><p class="soft">{html.escape(note)}</p>{filters(choices)}'
        f"{''.join(articles[i] for i in sorted(articles))}"
    )


def _article(a: Prediction, b: Prediction, change: str, images: PageImages) -> str:
    answers = "".join(
        gallery.answer("right" if outcome(p) == RIGHT else "wrong", f"{name}: {outcome(p)}", p)
        for name, p in (("A", a), ("B", b))
    )
    return (
        f'<article data-category="{html.escape(a.category)}" data-change="{change}">'
        f"<h3>{html.escape(gallery.title_of(a, change))}</h3>{images.of(a)}"
        f"<pre>{html.escape(gallery.shortened(a.question))}</pre>{answers}</article>"
    )

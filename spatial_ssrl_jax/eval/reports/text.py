"""Scores in the terminal: a report of one benchmark, or a table of several."""

import json
from collections.abc import Sequence

from spatial_ssrl_jax.common.text import printable
from spatial_ssrl_jax.eval.benchmarks.pretext import CHANCE
from spatial_ssrl_jax.eval.benchmarks.registry import SCORED
from spatial_ssrl_jax.eval.scoring.published import VARIANT, comparable, published, published_table
from spatial_ssrl_jax.eval.scoring.scores import Scores


def print_scores(found: Sequence[Scores], several: bool, as_json: bool) -> None:
    """One benchmark's report, or a line each and a table of several; or their JSON."""
    if as_json:
        whole = [scores.as_json() for scores in found]
        print(json.dumps({"scores": whole} if several or not whole else whole[0]))
    elif not several:
        print(printable("\n".join(map(_report, found))), end="\n" if found else "")
    elif found:
        titles = {name: spec.title for name, spec in SCORED.items()}
        ours = {scores.benchmark: comparable(scores) for scores in found}
        print(printable("\n".join([*map(_headline, found), "", published_table(ours, titles)])))


def _headline(scores: Scores) -> str:
    low, high = scores.ci95
    return (
        f"{SCORED[scores.benchmark].title}: {scores.score:.2f} [{low:.2f}, {high:.2f}], "
        f"{scores.count} questions, {scores.unparsed} without an answer that can be read (wrong)"
    )


def _report(scores: Scores) -> str:
    """The score with its interval, its categories, and the paper's scores."""
    lines = [_headline(scores)]
    lines += [
        f"  {name}: {value:.2f}"
        for name, value in scores.extra.items()
        if not name.startswith(CHANCE)
    ]
    width = max(map(len, scores.categories))
    lines += [
        f"  {name:{width}}  {found['score']:6.2f}  of {found['count']}{_chance(scores, name)}"
        for name, found in scores.categories.items()
    ]
    rows = published(scores.benchmark)
    if rows:
        variant = VARIANT.get(scores.benchmark)
        lines.append(f"the paper{f' (compare {variant!r} above)' if variant else ''}:")
        lines += [f"  {model}: {value:.2f}" for model, value in rows.items()]
    return "\n".join(lines)


def _chance(scores: Scores, category: str) -> str:
    """A category's chance level, where it is known."""
    chance = scores.extra.get(CHANCE + category)
    return "" if chance is None else f"  (chance {chance:.2f})"

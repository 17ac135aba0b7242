"""Records that a run cannot use: what its sources leave out, and how many there may be."""

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.data.sources import AnySource, QuestionSource
from spatial_ssrl_jax.data.sources.mixture import mixture_parts

_FEW = 20  # records of which any number may be bad


def check_bad_fraction(
    config: Config, spec: str, bad: int, tried: int, what: str = "images"
) -> None:
    """Checks the fraction of records that could not be used.

    Args:
      config: of the run.
      spec: of their source.
      bad: how many could not.
      tried: how many there were.
      what: they are, for the error.

    Raises:
      UserError: it exceeds `data.max_bad_fraction`, of at least twenty.
    """
    if tried >= _FEW and bad > config.data.max_bad_fraction * tried:
        raise UserError(
            f"{bad:,} of {tried:,} {what} from {spec} could not be used: fix the source, or raise "
            "data.max_bad_fraction."
        )


def check_bad_rows(config: Config, source: AnySource) -> None:
    """Checks the rows that are no questions; raises as `check_bad_fraction`."""
    for part in mixture_parts(source):
        if isinstance(part.source, QuestionSource):
            rows = part.source.rows
            total, first = len(rows.bad) + len(rows.questions), rows.bad[:1]
            what = f"questions (the first: {first[0].rstrip('.')})" if first else "questions"
            check_bad_fraction(config, part.source.spec, len(rows.bad), total, what)

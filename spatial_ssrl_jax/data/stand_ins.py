"""Stand-ins for data sets that are not at hand: built-in scenes of the sizes that they have."""

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.data.sources import OPENERS, AnySource, open_source
from spatial_ssrl_jax.data.sources.mixture import split_spec
from spatial_ssrl_jax.data.sources.options import split_options

# Width x height and share of each kind's images. Those of COCO and MegaDepth are assumptions: of
# COCO the four commonest, of MegaDepth photos whose longer side is 1,600 pixels.
_COCO = {"640x480": 3.0, "640x427": 3.0, "480x640": 1.0, "427x640": 1.0}
_SIZES: dict[str, dict[str, float]] = {
    "folder": _COCO,
    "coco": _COCO,
    "diode": {"1024x768": 1.0},
    "megadepth": {"1600x1064": 3.0, "1064x1600": 1.0},
    "nyu": {"640x480": 1.0},
}
_WITHOUT_DEPTH = ("folder", "coco")
_SCENES = 9  # images of a size


def own_source(config: Config) -> AnySource:
    """The config's source, or where it cannot be opened its `stand_in`.

    Raises:
      UserError: see `stand_in`.
    """
    try:
        return open_source(config.data.source, config.data.reading, config.all_tasks)
    except UserError:
        return open_source(stand_in(config), tasks=config.all_tasks)


def stand_in(config: Config) -> str:
    """The config's SPEC with each source replaced by scenes of its sizes; weights and tasks stay.

    Raises:
      UserError: nothing is known of the sizes of one of its kinds.
    """
    parts = []
    for part in split_spec(config.data.source, list(OPENERS), config.all_tasks):
        spec, _ = split_options(part.spec, part.spec)
        kind, _, argument = spec.partition(":")
        if kind == "tfds":  # what `prepare` packs, or a data set of the catalogue
            kind = argument.removeprefix("ssrl_pictures/").partition("@")[0].partition("/")[0]
        tasks = part.tasks
        if kind == "scenes":
            sizes = {part.spec: 1.0}
        elif kind in _SIZES:
            sizes = {f"scenes:{_SCENES}:{size}": n for size, n in _SIZES[kind].items()}
        else:
            raise UserError(
                f"{part.spec} cannot be opened here, and the sizes of such images are not known: "
                "give a source that is here."
            )
        if tasks is None and kind in _WITHOUT_DEPTH:
            tasks = tuple(task.name for task in config.all_tasks if not task.needs_depth)
        names, total = f"{','.join(tasks)}@" if tasks else "", sum(sizes.values())
        parts += [f"{names}{part.weight * n / total:.6f}*{size}" for size, n in sizes.items()]
    return "+".join(parts)

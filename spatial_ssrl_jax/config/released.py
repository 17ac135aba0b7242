"""The settings of the released data, with which the paper's models were trained."""

from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.tasks import depth, position
from spatial_ssrl_jax.tasks.example import TaskSettings


def released_tasks() -> dict[str, TaskSettings]:
    """Task settings of Spatial-SSRL-81k where they differ from the paper's text.

    Depth regions are in three bands, pairs are those nearest the centre, cameras seldom look away
    from the viewer, and pictures with depth fill the boxes of the released figures, with markers
    as large as there: 53 and 41 pixels.
    """
    return Config("released").tasks | {
        "depth": depth.DepthSettings(bands="released", marker=29.0, fit_box=depth.RELEASED_BOX),
        "position": position.PositionSettings(
            choice="released",
            marker=18.0,
            headings={"left": 30.0, "right": 30.0, "towards": 30.0, "away": 10.0},
            fit_box=position.RELEASED_BOX,
        ),
    }

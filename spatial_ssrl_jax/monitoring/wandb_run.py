"""Weights & Biases, when `log.wandb` names a project: the same metrics under the same names."""

import tempfile
from collections.abc import Mapping
from typing import Any

from etils import epath

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.paths import in_bucket
from spatial_ssrl_jax.common.text import error_line

_FILE = "wandb_run.txt"  # the run's id, so that a restart continues in the same curves


def check_wandb(project: str) -> None:
    """Checks that the package is installed when a project is named.

    Raises:
      UserError: `wandb` cannot be imported.
    """
    if project:
        try:
            import wandb  # noqa: F401  # pyright: ignore[reportMissingImports] - optional
        except ImportError as error:
            raise UserError(
                f"log.wandb={project} needs W&B: pip install 'spatial_ssrl_jax[wandb]', or leave "
                "log.wandb empty."
            ) from error


class WandbRun:
    """One run at W&B.

    Args:
      project: the project's name.
      name: the run's name.
      workdir: the run's folder, for the id and, unless in a bucket, W&B's own files.
      config: the config as plain types.

    Raises:
      UserError: W&B cannot start.
    """

    def __init__(self, project: str, name: str, workdir: epath.PathLike, config: dict[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports] - optional

        path = epath.Path(workdir) / _FILE
        known = path.read_text().strip() if path.is_file() else None
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                config=config,
                dir=tempfile.mkdtemp() if in_bucket(workdir) else str(workdir),
                id=known,
                resume="allow" if known else None,
            )
        except Exception as error:  # W&B raises any error of its service
            raise UserError(
                f"W&B cannot start ({error_line(error)}): log in with `wandb login`, set "
                "WANDB_MODE=offline, or leave log.wandb empty."
            ) from error
        path.write_text(self._run.id + "\n")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Logs one step's metrics; after a restart W&B itself ignores steps that it has."""
        self._run.log(values, step=step)

    def finish(self) -> None:
        """Sends the remaining metrics."""
        self._run.finish()

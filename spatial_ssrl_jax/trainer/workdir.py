"""A run's folder: whether it is free or holds the same run, and its first files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from spatial_ssrl_jax.checkpoint.export import copy_files, write_config, write_generation_config
from spatial_ssrl_jax.checkpoint.models import ModelFolder
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.json_file import read_object
from spatial_ssrl_jax.common.outputs import (
    atomic_folder,
    check_inputs,
    check_output_folder,
    check_writable,
    claim_output_folder,
    mark,
)
from spatial_ssrl_jax.common.paths import write_atomic
from spatial_ssrl_jax.config.load import to_dict
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.trainer.run_inputs import (
    RunInputs,
    check_same_inputs,
    write_fingerprints,
)

# Sections and keys that may change when a run resumes: they change the results by rounding alone,
# or are limits that a stopped run is told to raise.
_SAFE_SECTIONS = ("checkpoint", "compile", "log", "mesh")
_SAFE_KEYS = (
    "data.allow_outside_paths",
    "data.max_bad_fraction",
    "data.threads",
    "data.workers",
    "model.attention",
    "model.remat",
    "reward.max_failed_fraction",
    "reward.timeout",
    "reward.workers",
    "rollout.attention",
    "rollout.batch_prompts",
    "rollout.prefill_prompts",
)


def check_workdir(config: Config, workdir: epath.Path, overwrite: bool, inputs: RunInputs) -> bool:
    """Checks that a folder can be this run's; changes nothing.

    Args:
      config: the run.
      workdir: the folder.
      overwrite: its present content may be removed.
      inputs: what the run reads.

    Returns:
      Whether the same run stopped there, and resumes.

    Raises:
      UserError: it is not writable, is not empty, contains an input, or holds another run, or one
        that began with other inputs.
    """
    path = workdir / "config.json"
    if overwrite or not path.is_file():
        check_output_folder(workdir, overwrite, *inputs.paths)
        return False
    check_inputs(workdir, *inputs.paths)
    check_writable(workdir)
    before = read_object(path, "choose another --workdir, or give --overwrite").values
    _check_same(before, json.loads(json.dumps(to_dict(config))), workdir)
    check_same_inputs(workdir, config, inputs)
    return True


def claim_workdir(config: Config, workdir: epath.Path, overwrite: bool, inputs: RunInputs) -> None:
    """Creates the folder or resumes in it, and writes `config.json` and `inputs.json`.

    Arguments are as those of `check_workdir`.

    Raises:
      UserError: as `check_workdir`.
    """
    if not check_workdir(config, workdir, overwrite, inputs):
        claim_output_folder(workdir, overwrite, *inputs.paths)
    mark(workdir)
    write_atomic(workdir / "config.json", json.dumps(to_dict(config), indent=2) + "\n")
    write_fingerprints(workdir, inputs)


def _check_same(before: Mapping[str, Any], now: dict[str, Any], workdir: epath.Path) -> None:
    changed = [key for key in _differences(before, now) if not _is_safe(key, now)]
    if changed:
        raise UserError(
            f"{workdir} holds a run with another config ({', '.join(changed[:4])} changed): "
            "resume with the old values, choose another --workdir, or give --overwrite."
        )


def _is_safe(key: str, config: dict[str, Any]) -> bool:
    """Whether a setting may change when a run resumes.

    The number of GRPO steps may, unless the learning rate or the KL's weight follows it.
    """
    if key == "grpo.steps":
        grpo = config["grpo"]
        schedules = {grpo["schedule"], grpo["kl_schedule"]}
        return schedules == {"constant"} and not grpo["warmup_ratio"]
    return key.split(".")[0] in _SAFE_SECTIONS or key in _SAFE_KEYS


def _differences(a: object, b: object, path: str = "") -> Iterator[str]:
    """The keys whose values differ between two nested dicts."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            yield from _differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif a != b:
        yield path


def write_model_files(
    model: ModelFolder, stop_ids: Sequence[int], temperature: float, folder: epath.Path
) -> None:
    """Writes config, tokenizer, processor and generation files, unless they are there.

    Args:
      model: the run's.
      stop_ids: tokens that end a response.
      temperature: of the run's sampling.
      folder: what its checkpoints and exports take these files from.
    """
    if (folder / "config.json").exists():
        return
    with atomic_folder(folder, replaces=lambda _: True) as partial:
        copy_files(model, partial)
        write_config(model.config, partial, "float32")
        write_generation_config(model.config, stop_ids, partial, temperature)

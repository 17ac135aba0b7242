"""What a run reads: where it is, and whether it is still the same when the run resumes."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from etils import epath

from spatial_ssrl_jax.checkpoint.models import ModelFolder, open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.fingerprint import fingerprint, hash_texts
from spatial_ssrl_jax.common.json_file import read_object
from spatial_ssrl_jax.common.paths import write_atomic
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.data.processor import PROCESSOR_FILES
from spatial_ssrl_jax.data.sources import AnySource, open_source
from spatial_ssrl_jax.data.sources.mixture import source_notes

INPUTS_FILE = "inputs.json"


@dataclass(frozen=True)
class RunInputs:
    """What a run reads.

    Attributes:
      paths: files and folders; the run's folder must not contain any.
      fingerprints: a hash of each input that decides the result, by the setting that names it.
    """

    paths: list[epath.PathLike]
    fingerprints: dict[str, str]

    @classmethod
    def of(cls, config: Config, model: ModelFolder, source: AnySource) -> "RunInputs":
        """The inputs of a run with an opened model and source."""
        return cls(_paths(config, model, source), _fingerprints(config, model, source))


def _paths(config: Config, model: ModelFolder, source: AnySource) -> list[epath.PathLike]:
    found = [*model.inputs, *source.inputs]
    if config.grpo.init_from:
        found += open_model(config.grpo.init_from).inputs
    if responses := _responses(config):
        found += responses.inputs
    if config.eval.benchmark_data:
        found.append(config.eval.benchmark_data)
    return found


def _fingerprints(config: Config, model: ModelFolder, source: AnySource) -> dict[str, str]:
    found = {
        "model.path": _model_fingerprint(model, config.model.from_scratch),
        "data.source": source.fingerprint(),
    }
    if config.grpo.init_from:
        found["grpo.init_from"] = _model_fingerprint(open_model(config.grpo.init_from))
    if responses := _responses(config):
        found["sft.responses"] = responses.fingerprint()
    return found


def check_same_inputs(workdir: epath.Path, config: Config, inputs: RunInputs) -> None:
    """Checks that a run resumes with the inputs that it began with.

    Raises:
      UserError: weights or records are not the same any more.
    """
    path = workdir / INPUTS_FILE
    try:
        before = read_object(path, "choose another --workdir, or give --overwrite").values
    except FileNotFoundError:
        if not (workdir / "checkpoints").exists():
            return  # stopped before it began
        raise UserError(
            f"{workdir} holds a run of an earlier version, which held out other images: choose "
            "another --workdir; grpo.init_from starts a new run from a checkpoint."
        ) from None
    changed = list(_changed(config, before, inputs.fingerprints))
    if changed:
        raise UserError(
            f"{workdir} holds a run that began with other content of {' and of '.join(changed)}: "
            "put the old content back, choose another --workdir, or give --overwrite; "
            "grpo.init_from starts a new run from a checkpoint."
        )


def write_fingerprints(workdir: epath.Path, inputs: RunInputs) -> None:
    """Writes what `check_same_inputs` compares with; a resumed run keeps what is there."""
    if not (workdir / INPUTS_FILE).exists():
        write_atomic(workdir / INPUTS_FILE, json.dumps(inputs.fingerprints, indent=1) + "\n")


def _changed(config: Config, before: Mapping[str, Any], now: dict[str, str]) -> Iterator[str]:
    for name, value in now.items():
        if before.get(name) != value:
            section, key = name.split(".")
            yield f"{name} ({getattr(getattr(config, section), key)})"


def _responses(config: Config) -> AnySource | None:
    """The responses that SFT reads; None where it makes its own."""
    spec = config.sft.responses_spec
    if not config.sft.steps or spec is None:
        return None
    return open_source(spec, config.data.reading)


def left_out(config: Config, source: AnySource) -> list[str]:
    """Sentences about files and rows that a run's inputs leave out."""
    responses = _responses(config)
    return source_notes(source) + (source_notes(responses) if responses is not None else [])


def _model_fingerprint(model: ModelFolder, from_scratch: bool = False) -> str:
    files = {n: model.files / n for n in ("config.json", *PROCESSOR_FILES)}
    described = fingerprint({n: path for n, path in files.items() if path.is_file()})
    return described if from_scratch else hash_texts([described, model.fingerprint()])

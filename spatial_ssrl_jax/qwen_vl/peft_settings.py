"""The `adapter_config.json` of Hugging Face's PEFT: what of it is applied, and what is refused.

What PEFT calls LoRA has many forms. Accepted are those whose merged weights are the base's plus
`B @ A * scale`; a setting that is not known to leave them so is refused by name.
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from spatial_ssrl_jax.common.bounds import Bounds, Count, invalid_values
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.json_file import read_object
from spatial_ssrl_jax.common.text import error_line

# Settings that change no merged weight, whatever their value: where the adapter comes from, how it
# is trained, which modules it covers (its tensors say so), and options of what is itself refused.
_NEUTRAL = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
)
# Values with which a setting changes no merged weight. Any other setting must be null, false or
# empty, as PEFT writes those of the forms of LoRA that are not used.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # The other ways to begin, such as pissa, change the base.
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva", "mica"),
}
_FLOAT32 = Bounds(min=-float(np.finfo(np.float32).max), max=float(np.finfo(np.float32).max))


@dataclass(frozen=True)
class AdapterSettings:
    """The settings that are applied, under their names in the file.

    Modules are given by their names in the adapter's tensors, without PEFT's prefix.
    """

    r: Count
    lora_alpha: Annotated[float, _FLOAT32]
    use_rslora: Annotated[bool, Bounds()] = False  # bounded, so that no dict of settings passes
    rank_pattern: Annotated[dict[str, int], Bounds(min=1)] = field(default_factory=dict)
    alpha_pattern: Annotated[dict[str, float], _FLOAT32] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()

    def rank(self, module: str) -> int:
        """Rank of a module: of the first pattern that its name ends with, or `r`."""
        ranks = (x for key, x in self.rank_pattern.items() if _ending(key).match(module))
        return next(ranks, self.r)

    def scale(self, module: str) -> float:
        """Factor of a module's product; its alpha is looked up as its rank is."""
        alphas = (x for key, x in self.alpha_pattern.items() if _ending(key).match(module))
        rank = self.rank(module)
        return next(alphas, self.lora_alpha) / (rank**0.5 if self.use_rslora else rank)

    def covers(self, module: str) -> bool:
        """Whether a module's layer is among `layers_to_transform`; always, where that is empty."""
        if not self.layers_to_transform:
            return True
        matches = (_numbered(key).match(module) for key in self.layers_pattern or (r"[^.]*",))
        found = next(filter(None, matches), None)
        return found is not None and int(found["layer"]) in self.layers_to_transform


def _ending(pattern: str) -> re.Pattern[str]:
    """What PEFT looks for in a module's name, for a key of `rank_pattern` or `alpha_pattern`."""
    return re.compile(rf"(.*\.)?({pattern})$")


def _numbered(pattern: str) -> re.Pattern[str]:
    """What PEFT looks for in a module's name, for an item of `layers_pattern`."""
    return re.compile(rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.")


_REPEATED_GROUP = re.compile(r"\)[*+{?]")  # which a search may need ages for


def read_settings(path: Path) -> AdapterSettings:
    """Reads an adapter's settings, and refuses those with which it is no plain LoRA.

    Raises:
      UserError: the file is missing or broken, or holds a setting or a value that is not known.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: give a folder that PEFT or a run wrote.")
    raw = read_object(path).values
    applied = [field.name for field in dataclasses.fields(AdapterSettings)]
    for key, value in {"peft_type": None, **raw}.items():
        empty = key != "peft_type" and (value is None or value is False or value in ("", [], {}))
        if not (empty or key in (*applied, *_NEUTRAL) or value in _ACCEPTED.get(key, ())):
            text = json.dumps(value)
            to = f" to {text}" if len(text) < 40 else ""
            raise UserError(
                f"{path} sets {key}{to}, but only plain LoRA on an unchanged base is supported: "
                "merge it with PEFT, where PEFT can."
            )
    given: dict[str, Any] = {key: raw[key] for key in applied if raw.get(key) is not None}
    return _checked(path, {"r": None, "lora_alpha": None, **given})


def _checked(path: Path, values: dict[str, Any]) -> AdapterSettings:
    """The settings, each of its type, in its range, and with patterns that can be looked for."""
    for key in ("layers_to_transform", "layers_pattern"):
        value = values.get(key, [])
        values[key] = tuple(value) if isinstance(value, list) or value == "" else (value,)
    settings = AdapterSettings(**values)
    problem = next(invalid_values(settings), None)
    if problem is None:
        try:
            for key in (*settings.rank_pattern, *settings.alpha_pattern):
                _ending(key)
            for key in settings.layers_pattern:
                _numbered(key)
        except (re.error, OverflowError, RecursionError) as error:
            problem = f"a pattern is not a regular expression ({error_line(error)})"
    patterns = (*settings.rank_pattern, *settings.alpha_pattern, *settings.layers_pattern)
    if problem is None and any(map(_REPEATED_GROUP.search, patterns)):
        problem = "a pattern repeats a group, which is not read"
    if problem is not None:
        raise UserError(f"{path}: {problem}, so fetch it again.")
    return settings

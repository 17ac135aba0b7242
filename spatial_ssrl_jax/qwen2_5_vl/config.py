"""Qwen2.5-VL's shape, read from and written to a Hugging Face `config.json`."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spatial_ssrl_jax.errors import UserError


@dataclass(frozen=True)
class TextConfig:
    """The language model. Head size is `hidden_size // num_attention_heads`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    mrope_section: tuple[int, int, int]
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 128_000

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower. Pixel sizes are for pictures after the processor's resizing."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    fullatt_block_indexes: tuple[int, ...]
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    tokens_per_second: float = 2
    in_channels: int = 3

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches merged into one token of the language model."""
        return self.spatial_merge_size**2

    @property
    def window_side(self) -> int:
        """Merged tokens along one side of an attention window."""
        return self.window_size // self.patch_size // self.spatial_merge_size

    @property
    def window_patches(self) -> int:
        return self.window_side**2 * self.merge_unit


@dataclass(frozen=True)
class Qwen2_5_VLConfig:  # noqa: N801 - the model's own name
    """A whole model. Token ids are the hub's."""

    text: TextConfig
    vision: VisionConfig
    tie_word_embeddings: bool
    image_token_id: int = 151_655
    video_token_id: int = 151_656
    vision_start_token_id: int = 151_652
    vision_end_token_id: int = 151_653
    bos_token_id: int = 151_643
    eos_token_id: int = 151_645
    suppressed: tuple[int, ...] = field(default=(), compare=True)

    @property
    def vision_tokens(self) -> tuple[int, ...]:
        """Ids that stand for vision input and are never sampled."""
        known = (
            self.vision_start_token_id,
            self.vision_end_token_id,
            self.image_token_id,
            self.video_token_id,
        )
        return tuple(sorted({*known, *self.suppressed}))


_TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "max_position_embeddings",
)
_VISION_KEYS = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "out_hidden_size",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "window_size",
    "tokens_per_second",
)
_TOKEN_KEYS = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "bos_token_id",
    "eos_token_id",
)


def read_config(folder: Path) -> Qwen2_5_VLConfig:
    """Reads `config.json` in the hub's flat style or the newer nested one.

    Raises:
      UserError: the file is missing, is not JSON, or describes another model.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(
            f"{path} is missing: --model needs a Qwen2.5-VL folder as the hub lays it out."
        )
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch it again.") from None
    return config_from_dict(raw, str(path))


def config_from_dict(raw: dict[str, Any], name: str) -> Qwen2_5_VLConfig:
    """Builds the config from the parsed `config.json`; `name` is used in errors."""
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind != "qwen2_5_vl":
        raise UserError(
            f"{name} describes a {kind!r} model; expected 'qwen2_5_vl', so give another folder."
        )
    try:
        text = {**raw, **raw.get("text_config", {})}
        vision = raw.get("vision_config", {})
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        _refuse_variants(text, vision, rope, name)
        return Qwen2_5_VLConfig(
            text=TextConfig(
                **{k: text[k] for k in _TEXT_KEYS},
                mrope_section=tuple(rope["mrope_section"]),
                rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 1e6))),
            ),
            vision=VisionConfig(
                **{k: vision[k] for k in _VISION_KEYS},
                fullatt_block_indexes=tuple(vision["fullatt_block_indexes"]),
                in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
            ),
            tie_word_embeddings=bool(
                raw.get("tie_word_embeddings", text.get("tie_word_embeddings"))
            ),
            **{
                k: _token(text.get(k, raw.get(k)))
                for k in _TOKEN_KEYS
                if text.get(k, raw.get(k)) is not None
            },
        )
    except KeyError as error:
        raise UserError(
            f"{name} lacks the key {error}; expected Qwen2.5-VL's config.json: fetch it again."
        ) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{name} holds a wrong value ({error}): fetch it again.") from None


def _refuse_variants(text: dict, vision: dict, rope: dict, name: str) -> None:
    """Stops where the reference would compute something else than we do."""
    settings = {
        "rope type": (rope.get("rope_type", rope.get("type", "mrope")), ("default", "mrope")),
        "hidden_act": (text.get("hidden_act", "silu"), ("silu",)),
        "vision_config.hidden_act": (vision.get("hidden_act", "silu"), ("silu",)),
        "use_sliding_window": (text.get("use_sliding_window", False), (False,)),
    }
    for key, (value, known) in settings.items():
        if value not in known:
            raise UserError(
                f"{name} sets {key} to {value!r}, which is not supported; expected "
                f"{' or '.join(map(repr, known))}."
            )


def _token(value: int | list[int]) -> int:
    return value if isinstance(value, int) else value[0]


def config_to_dict(config: Qwen2_5_VLConfig, dtype: str) -> dict[str, Any]:
    """The hub's flat `config.json`, as Transformers and vLLM read it; `dtype` like `bfloat16`."""
    text = dataclasses.asdict(config.text)
    section, theta = list(text.pop("mrope_section")), text.pop("rope_theta")
    vision = dataclasses.asdict(config.vision)
    vision["in_chans"] = vision.pop("in_channels")
    vision["spatial_patch_size"] = config.vision.patch_size
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "qwen2_5_vl",
        **text,
        "rope_theta": theta,
        "rope_scaling": {"type": "mrope", "mrope_section": section},
        "max_window_layers": config.text.num_hidden_layers,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "use_cache": True,
        **{k: getattr(config, k) for k in _TOKEN_KEYS},
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "vision_config": {
            **vision,
            "fullatt_block_indexes": list(config.vision.fullatt_block_indexes),
            "hidden_act": "silu",
            "model_type": "qwen2_5_vl",
        },
    }

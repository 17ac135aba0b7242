"""The sizes of a Qwen-VL model: what the members of the family share."""

from dataclasses import dataclass

# Fields of `VisionConfig` that are in preprocessor_config.json.
PIXEL_KEYS = ("image_mean", "image_std")


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

    @property
    def layer_weights(self) -> int:
        """Weights of the matmuls of all layers."""
        heads = 2 * (self.num_attention_heads + self.num_key_value_heads) * self.head_dim
        return self.num_hidden_layers * self.hidden_size * (heads + 3 * self.intermediate_size)


@dataclass(frozen=True)
class VisionConfig:
    """A vision tower. Sizes in pixels are those of images after the processor's resizing.

    Attributes:
      window_size: side of a window in pixels, inside which a patch sees others in some blocks.
      image_mean, image_std: mean and standard deviation of pixels in [0, 1], by channel.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    in_channels: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values of one patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def block_weights(self) -> int:
        """Weights of the matmuls of all blocks."""
        width = self.hidden_size
        return self.depth * (4 * width**2 + 3 * width * self.intermediate_size)

    @property
    def merge_unit(self) -> int:
        """Patches merged into one token of the language model."""
        return self.spatial_merge_size**2

    @property
    def window_side(self) -> int:
        """Merged tokens along one side of a window."""
        return self.window_size // self.patch_size // self.spatial_merge_size

    @property
    def window_patches(self) -> int:
        """Patches of a window."""
        return self.window_side**2 * self.merge_unit

    @property
    def full_attention_blocks(self) -> int:
        """Blocks in which a patch sees its whole image; in the others it sees its window."""
        return self.depth


@dataclass(frozen=True)
class QwenVLConfig:
    """A whole model. Token ids are the Hub's.

    Attributes:
      model_type: the member of the family, as `config.json` names it.
      suppressed: further token ids that are never sampled.
    """

    model_type: str
    text: TextConfig
    vision: VisionConfig
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    bos_token_id: int
    eos_token_id: int
    suppressed: tuple[int, ...] = ()

    @property
    def vision_tokens(self) -> tuple[int, ...]:
        """Ids that are never sampled: those of vision input and `suppressed`; ascending."""
        known = (
            self.vision_start_token_id,
            self.vision_end_token_id,
            self.image_token_id,
            self.video_token_id,
        )
        return tuple(sorted({*known, *self.suppressed}))

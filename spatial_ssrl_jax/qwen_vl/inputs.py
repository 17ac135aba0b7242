"""The model's inputs: batches of prompts and rows of packed groups, with their images.

Shape letters: B prompts or rows, T tokens, R response tokens, P patches.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spatial_ssrl_jax.qwen_vl.attention import GroupLimits
from spatial_ssrl_jax.qwen_vl.config import VisionConfig

# What a batch holds: `np.ndarray` on the host, `jax.Array` on devices, `jax.ShapeDtypeStruct` for
# programs that are only compiled.
Leaf = TypeVar("Leaf")

# Temporal frames, patch rows and patch columns of an image or a video.
Grid = tuple[int, int, int]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VisionInput(Generic[Leaf]):
    """All images and frames of each prompt, laid out by the host in the vision tower's order.

    The four patches of a merged token are neighbours, and those of a window.

    Attributes:
      patches: [B, P, C·2·14·14] uint8, pixels.
      frame: [B, P] int32, which image or temporal frame of the prompt; -1 is padding.
      coords: [B, P, 2] int32, row and column of the patch in its image.
    """

    patches: Leaf
    frame: Leaf
    coords: Leaf

    @property
    def length(self: "VisionInput[np.ndarray] | VisionInput[Array]") -> int:
        """P."""
        return self.frame.shape[1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VisionFeatures(Generic[Leaf]):
    """All images and frames of each prompt after the vision tower, where that does not train.

    Attributes:
      tokens: [B, M, C], M = P/4 merged tokens in the order of patches: what the merger gives, or,
        where that trains, what it takes.
      merged: whether the merger was applied.
    """

    tokens: Leaf
    merged: bool = field(metadata={"static": True})

    @property
    def length(self: "VisionFeatures[np.ndarray] | VisionFeatures[Array]") -> int:
        """M."""
        return self.tokens.shape[1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PromptBatch(Generic[Leaf]):
    """B prompts padded to one bucket, images included.

    Attributes:
      ids: [B, T] int32 token ids, padded at the end.
      length: [B] int32 tokens of each prompt.
      position: [B, 3, T] int32 M-RoPE positions.
      next_position: [B] int32 position of the first response token.
      image_index: [B, T] int32 merged vision token at each token, -1 for text.
      vision: the images' patches, or their features.
    """

    ids: Leaf
    length: Leaf
    position: Leaf
    next_position: Leaf
    image_index: Leaf
    vision: VisionInput[Leaf] | VisionFeatures[Leaf]

    @property
    def valid(self: "PromptBatch[Array]") -> Array:
        """[B, T] bool, which tokens exist."""
        return jnp.arange(self.ids.shape[1]) < self.length[:, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedRows(Generic[Leaf]):
    """B rows of groups: `[prompt | response 1 | … | response G | next prompt | …]`.

    Attributes:
      ids: [B, T] int32 token ids, padded at the end, and after prompts where responses have to
        start at certain places.
      segment: [B, T] int32, which group of the row; -1 is padding.
      response: [B, T] int32, which response of the group from 1; 0 is the prompt and padding.
      position: [B, 3, T] int32 M-RoPE positions, each response's as if it were alone after its
        prompt.
      image_index: [B, T] int32 merged vision token of the row at each token, -1 for text.
      place: [B, R] int32, index of the token that predicts each response token: the one before it,
        or the prompt's last; -1 is padding.
      label: [B, R] int32, the response tokens.
      sample: [B, R] int32, which response of the row each is of; -1 is padding.
      vision: the patches of all the row's images, or their features.
      limits: of the groups.
    """

    ids: Leaf
    segment: Leaf
    response: Leaf
    position: Leaf
    image_index: Leaf
    place: Leaf
    label: Leaf
    sample: Leaf
    vision: VisionInput[Leaf] | VisionFeatures[Leaf]
    limits: GroupLimits = field(metadata={"static": True})

    @property
    def mask(self: "PackedRows[Array]") -> Array:
        """[B, R] float32, 1 where a response token is."""
        return (self.place >= 0).astype(jnp.float32)


@dataclass(frozen=True)
class PatchLayout:
    """The patches of one prompt's images in the order in which a vision tower takes them.

    Attributes:
      source: [P] int32, which of the processor's patches is at each place.
      frame: [P] int32, which image or temporal frame.
      coords: [P, 2] int32, row and column of the patch in its image.
      merged: [P/4] int32, the place of each merged token in reading order.
    """

    source: np.ndarray
    frame: np.ndarray
    coords: np.ndarray
    merged: np.ndarray


def patch_count(grids: Iterable[Grid]) -> int:
    """Patches of images."""
    return sum(t * h * w for t, h, w in grids)


def merged_tokens(config: VisionConfig, grid: Grid) -> int:
    """Tokens of an image in the prompt."""
    return patch_count([grid]) // config.merge_unit

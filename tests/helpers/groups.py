"""Groups of responses as rectangles, packed rows made of them, and the sequences one by one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spatial_ssrl_jax.data.batching import pad_prompts
from spatial_ssrl_jax.data.packing import Content, Group, ResponseTokens, RowShape, fill_rows
from spatial_ssrl_jax.data.processor import Prompt
from spatial_ssrl_jax.qwen_vl import model as qwen
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.inputs import PackedRows, PromptBatch
from spatial_ssrl_jax.qwen_vl.model import Params
from spatial_ssrl_jax.qwen_vl.rope import text_rotary
from spatial_ssrl_jax.rl.batch import GroupBatch

Rows = Sequence[Sequence[int]]


def pack_groups(
    config: QwenVLConfig,
    prompts: Sequence[Prompt],
    tokens: np.ndarray,
    length: np.ndarray,
    rows: Rows,
    spare: int = 3,
    least: Content | None = None,
) -> tuple[PackedRows, ResponseTokens]:
    """Packed rows as small as they can be, with some spare room, and where each token is.

    Args:
      config: the model's shape.
      prompts: of the groups.
      tokens: [B, G, R] int32.
      length: [B, G] int32.
      rows: numbers of each row's groups.
      spare: tokens, merged tokens of images, and response tokens of padding in the fullest row.
      least: size of a row at least.
    """
    groups = [
        Group(prompt, [t[:n] for t, n in zip(*group, strict=True)])
        for prompt, *group in zip(prompts, tokens, length, strict=True)
    ]
    contents = np.array([group.content for group in groups])
    most = np.max([contents[list(row)].sum(axis=0) for row in rows], axis=0)
    most += spare * np.array((1, config.vision.merge_unit, 1))
    size = Content(*np.maximum(most, least or 0).tolist())
    shape = RowShape(size, int(tokens.shape[2]))
    return fill_rows(groups, rows, shape, config.vision)


def unpack(places: ResponseTokens, values: Array, shape: tuple[int, ...]) -> np.ndarray:
    """Values [B, R] of packed tokens as an array of groups, samples and tokens; 0 elsewhere."""
    found, held = np.zeros(shape, np.float32), places.group >= 0
    found[tuple(x[held] for x in places)] = np.asarray(values)[held]
    return found


@dataclass(frozen=True)
class Sampled:
    """Sampled groups as rectangles; see `GroupBatch` for what is of each token or sample.

    Attributes:
      prompts: B prompts.
      tokens, sampled_logprobs, old_logprobs, reference_logprobs: [B, G, R].
      length, weight, advantage: [B, G].
    """

    prompts: Sequence[Prompt]
    tokens: np.ndarray
    length: np.ndarray
    weight: np.ndarray
    advantage: np.ndarray
    sampled_logprobs: np.ndarray
    old_logprobs: np.ndarray
    reference_logprobs: np.ndarray

    @property
    def held(self) -> np.ndarray:
        """[B, G, R] bool, where tokens are."""
        return np.arange(self.tokens.shape[2]) < self.length[..., None]

    def packed(self, config: QwenVLConfig, rows: Rows, **settings: int) -> GroupBatch:
        """The groups of some rows."""
        return self.packed_with_places(config, rows, **settings)[0]

    def packed_with_places(
        self, config: QwenVLConfig, rows: Rows, **settings: int
    ) -> tuple[GroupBatch, ResponseTokens]:
        """The groups of some rows, and where each of their tokens is."""
        made, places = pack_groups(config, self.prompts, self.tokens, self.length, rows, **settings)
        batch = GroupBatch(
            rows=made,
            weight=places.of_samples(self.weight),
            normaliser=np.float32(self.length.sum()),
            advantage=places.of_samples(self.advantage),
            sampled_logprobs=places.of_tokens(self.sampled_logprobs),
            old_logprobs=places.of_tokens(self.old_logprobs),
            reference_logprobs=places.of_tokens(self.reference_logprobs),
        )
        return batch, places


def sequence(prompt: Prompt, response: np.ndarray) -> PromptBatch:
    """Prompt and response as one text, not padded."""
    more = prompt.next_position + np.arange(len(response), dtype=np.int32)
    absent = np.full(len(response), -1, np.int32)
    whole = replace(
        prompt,
        ids=np.concatenate((prompt.ids, response)),
        position=np.concatenate((prompt.position, np.tile(more, (3, 1))), axis=1),
        image_index=np.concatenate((prompt.image_index, absent)),
    )
    return pad_prompts([whole], len(whole.ids), len(whole.frame))


def sequence_logprobs(
    config: QwenVLConfig,
    params: Params,
    whole: PromptBatch,
    response: Array,
    temperature: float = 1.0,
) -> Array:
    """[R] log-probabilities of a response at the end of a text: nothing is packed or padded."""
    model, compute = qwen.bind(config, params), Compute(remat="none")
    x = qwen.embed_prompt(model, whole, compute)
    rotary = text_rotary(config.text, whole.position)
    hidden, _, _ = model.text.prefill(x, rotary, whole.valid, compute)
    start = whole.ids.shape[1] - len(response) - 1
    logits = hidden[0, start:-1] @ model.text.head_weight("float32").T / temperature
    return jax.nn.log_softmax(logits)[jnp.arange(len(response)), response]

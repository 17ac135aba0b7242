"""A model that is ready to respond: opened once, for every command and from Python."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from spatial_ssrl_jax.checkpoint.models import ModelFolder, open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import MeshSettings
from spatial_ssrl_jax.data.batching import pad_prompts
from spatial_ssrl_jax.data.images import upright_rgb
from spatial_ssrl_jax.data.processor import Processor, Prompt
from spatial_ssrl_jax.data.videos import Video
from spatial_ssrl_jax.inference.options import default_dtype
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.compute import Compute, Dtype
from spatial_ssrl_jax.qwen_vl.kernels import choose_decode_kernel
from spatial_ssrl_jax.qwen_vl.param_tree import Params
from spatial_ssrl_jax.rollout.decode import DecodeWeights
from spatial_ssrl_jax.rollout.engine import Engine, Rollout
from spatial_ssrl_jax.rollout.sampling import GREEDY, Sampling

_TOKEN_STEP, _PATCH_STEP = 128, 512  # shapes of single prompts: few programs for many sizes
ONE_PROMPT = MeshSettings(data=1, fsdp=1, tensor=-1)


@dataclass(frozen=True)
class Response:
    """One response.

    Attributes:
      text: without special tokens.
      ids: [R] int32, the end token included.
      logprobs: [R] float32, under the sampler.
      finished: whether it ended by itself, and not at the limit.
    """

    text: str
    ids: np.ndarray
    logprobs: np.ndarray
    finished: bool

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = {"ids": self.ids.tolist(), "logprobs": [float(p) for p in self.logprobs]}
        return values | {"text": self.text, "finished": self.finished}


@dataclass(frozen=True)
class Policy:
    """A model that is ready to respond.

    Attributes:
      processor: makes prompts and decodes responses.
      engine: samples; its `shards` are the layout's.
      layout: shards batches over the mesh.
      params: the model's parameters.
      weights: `engine.fill(params)`.
    """

    processor: Processor
    engine: Engine
    layout: Layout
    params: Params
    weights: DecodeWeights

    @classmethod
    def open(
        cls,
        model: epath.PathLike | ModelFolder,
        *,
        dtype: Dtype | None = None,
        mesh: MeshSettings = ONE_PROMPT,
        processor: Processor | None = None,
    ) -> "Policy":
        """Opens a model and loads its weights.

        Args:
          model: a folder as on the Hub, a checkpoint of ours, a Hub id, or what `open_model` gave.
          dtype: of weights and computation; None is float32 on CPU and bfloat16 elsewhere.
          mesh: how devices are used; by default one prompt at a time is spread over all, as
            `respond` and `generate` need it.
          processor: makes prompts; None is the folder's, with its own limits of an image's area.

        Raises:
          UserError: the model cannot be opened, or does not divide over the devices.
        """
        folder = model if isinstance(model, ModelFolder) else open_model(model)
        processor = processor or Processor(folder.files, folder.config)
        layout, dtype = Layout(make_mesh(mesh)), default_dtype(dtype)
        compute = Compute(dtype, decode_attention=choose_decode_kernel("auto", dtype, layout.mesh))
        params = folder.load(layout, dtype)
        engine = Engine(folder.config, compute, processor.stop_ids, shards=layout.batch_shards)
        return cls(processor, engine, layout, params, engine.fill(params))

    def respond(
        self,
        question: str,
        images: Sequence[Image.Image | np.ndarray] = (),
        videos: Sequence[Video] = (),
        *,
        samples: int = 1,
        sampling: Sampling = GREEDY,
        max_new_tokens: int = 512,
        seed: int = 0,
    ) -> list[Response]:
        """Responses to one question.

        Args:
          question: the user's text; `<image>` marks where an image goes, else they come first.
          images: PIL images, turned upright as from a file, or [H, W, 3] uint8 arrays.
          videos: likewise, at `<video>`.
          samples: responses; the prompt is computed once for all.
          sampling: how tokens are drawn.
          max_new_tokens: limit of a response.
          seed: of the draws.

        Raises:
          UserError: the prompt exceeds the context length, or its placeholders do not match.
          BadImage: an image cannot be used.
        """
        arrays = [
            upright_rgb(image, "the image") if isinstance(image, Image.Image) else image
            for image in images
        ]
        limit = self.engine.config.text.max_position_embeddings - max_new_tokens
        prompt = self.processor.prompt(question, arrays, videos, limit)
        return self.generate(
            prompt, samples=samples, sampling=sampling, max_new_tokens=max_new_tokens, seed=seed
        )

    def generate(
        self,
        prompt: Prompt,
        *,
        samples: int,
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        on_tokens: Callable[[np.ndarray, np.ndarray], None] | None = None,
    ) -> list[Response]:
        """As `respond`, to a prompt of `processor`; `on_tokens` as in `Engine.generate`.

        Raises:
          UserError: the policy is opened for batches of prompts, by its `mesh`; or the model
            gives no finite log-probabilities.
        """
        if (shards := self.layout.batch_shards) > 1:
            raise UserError(
                f"one prompt cannot be spread over {shards} shards of a batch: open the policy "
                "with mesh=MeshSettings(data=1, fsdp=1, tensor=-1), the default."
            )
        tokens = _round_up(len(prompt.ids), _TOKEN_STEP)
        patches = _round_up(len(prompt.frame), _PATCH_STEP)
        rollout = self.engine.generate(
            self.params,
            self.weights,
            [self.layout.put_batch(pad_prompts([prompt], tokens, patches))],
            group_size=samples,
            max_new_tokens=_round_up(max_new_tokens, self.engine.check_every),
            key=jax.random.key(seed),
            prompt_index=[np.zeros(1, np.int32)],
            sampling=sampling,
            on_tokens=on_tokens,
        )
        check_finite(finite_rows(rollout), self.engine.compute.dtype)
        return [self._response(rollout, g, max_new_tokens) for g in range(samples)]

    def _response(self, rollout: Rollout, g: int, limit: int) -> Response:
        whole = int(rollout.length[0, g])
        ids = rollout.tokens[0, g, : min(whole, limit)]
        logprobs = rollout.logprobs[0, g, : len(ids)]
        finished = bool(rollout.finished[0, g]) and whole <= limit
        return Response(self.processor.decode(ids), ids, logprobs, finished)


def finite_rows(rollout: Rollout) -> np.ndarray:
    """[B] bool, whether all log-probabilities of a prompt's responses are finite."""
    written = np.arange(rollout.logprobs.shape[-1]) < rollout.length[..., None]
    return (np.isfinite(rollout.logprobs) | ~written).all(axis=(1, 2))


def check_finite(finite: np.ndarray, dtype: str) -> None:
    """Raises `UserError` unless all of `finite_rows` are, as a broken model's are not."""
    if not finite.all():
        instead = "--dtype=float32, or " if dtype != "float32" else ""
        raise UserError(
            "the model's log-probabilities are not finite, so its weights are damaged or too large "
            f"for {dtype}: try {instead}another model."
        )


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step

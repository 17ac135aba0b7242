"""How a benchmark's questions are asked: style, sampling and limits."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from spatial_ssrl_jax.data.videos import MAX_FRAMES
from spatial_ssrl_jax.eval.benchmarks.prompts import Style
from spatial_ssrl_jax.eval.benchmarks.spec import BenchmarkSpec
from spatial_ssrl_jax.rollout.sampling import GREEDY, Sampling


@dataclass(frozen=True)
class EvalOptions:
    """How questions are asked; None takes the benchmark's own setting, as in published scores.

    Attributes:
      style: wording of the prompts.
      sampling: how tokens are drawn.
      samples: responses to each question.
      seed: of the draws.
      batch_prompts: max prompts in a batch on each of its shards.
      new_tokens: max tokens of a response.
      min_pixels, max_pixels: area of an image or of a video's frame.
      frames: max frames of a video.
    """

    style: Style = "direct"
    sampling: Sampling = GREEDY
    samples: int = 1
    seed: int = 0
    batch_prompts: int = 16
    new_tokens: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    frames: int | None = None

    def of(self, spec: BenchmarkSpec) -> "BenchmarkOptions":
        """The options of one benchmark, with its own settings in place of None."""
        min_pixels, max_pixels = spec.pixels or (None, None)
        return BenchmarkOptions(
            style=self.style,
            sampling=self.sampling,
            samples=self.samples,
            seed=self.seed,
            batch_prompts=self.batch_prompts,
            new_tokens=self.new_tokens or spec.new_tokens,
            min_pixels=self.min_pixels or min_pixels,
            max_pixels=self.max_pixels or max_pixels,
            frames=self.frames or spec.frames or MAX_FRAMES,
        )


@dataclass(frozen=True)
class BenchmarkOptions(EvalOptions):
    """`EvalOptions` of one benchmark, whose limits are known."""

    new_tokens: int = 2048
    frames: int = MAX_FRAMES

    def about(self) -> dict[str, Any]:
        """What decides the answers, for `asked.json`; the batch size does not."""
        values = dataclasses.asdict(self)
        del values["batch_prompts"]
        return values | values.pop("sampling")

"""From a benchmark's questions to prompts: sizes first, images when their batch is next."""

import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import lru_cache
from pathlib import Path

import numpy as np

from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.data.processor import Processor, Prompt, PromptSize
from spatial_ssrl_jax.data.videos import FPS, Video, measure_video, open_video
from spatial_ssrl_jax.eval.questions import BenchmarkPrompt, Question
from spatial_ssrl_jax.parallel.collectives import all_gather

_VIDEOS = 2  # kept decoded: questions about one video are next to each other


class PromptLoader:
    """Reads the images and videos of questions and makes their prompts; threads may share it.

    Attributes:
      reasons: why a question has no prompt, by its index.

    Args:
      questions: of one benchmark.
      prompts: the same questions in the wording of a style.
      processor: makes prompts.
      max_frames: of a video.
      max_tokens: of a prompt.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        prompts: Sequence[BenchmarkPrompt],
        processor: Processor,
        max_frames: int,
        max_tokens: int,
    ):
        self.questions, self.prompts = questions, prompts
        self.processor, self.max_tokens = processor, max_tokens
        self.reasons: dict[int, str] = {}
        self._decoding = threading.Lock()  # one video at a time: its decoder has threads of its own
        self._open = lru_cache(_VIDEOS)(lambda path: open_video(path, FPS, max_frames))
        self._measure = lru_cache(None)(lambda path: measure_video(path, FPS, max_frames))

    def sizes(self, pool: Executor) -> dict[int, PromptSize]:
        """Sizes of the prompts that every process can make, by index, from headers alone.

        Raises:
          UserError: a prompt is too long.
        """
        indices = range(len(self.prompts))
        sizes = list(pool.map(self._prompt_size, indices))
        here = np.array([size is not None for size in sizes])
        everywhere = np.all(all_gather(here).reshape(-1, len(sizes)), axis=0)
        return {i: size for i, size in enumerate(sizes) if size is not None and everywhere[i]}

    def _prompt_size(self, index: int) -> PromptSize | None:
        prompt = self.prompts[index]
        try:
            sizes = [image.size() for image in prompt.images]
            videos = [self._video_size(prompt.video)] if prompt.video else []
            size = self.processor.measure(sizes, prompt.text, videos)
        except BadImage as error:
            self._note(index, error)
            return None
        except UserError as error:
            raise UserError(f"{self._name(index)}: {error}") from None
        if size.tokens > self.max_tokens:
            raise UserError(
                f"{self._name(index)} takes {size.tokens} tokens with its images, but at most "
                f"{self.max_tokens} fit: lower --max-pixels or --max-frames."
            )
        return size

    def load(self, index: int) -> Prompt | None:
        """A question's prompt; None where it cannot be made, and `reasons` has why."""
        prompt = self.prompts[index]
        try:
            images = [image.open() for image in prompt.images]
            videos = [self._video(prompt.video)] if prompt.video else []
            return self.processor.prompt(prompt.text, images, videos)
        except BadImage as error:
            self._note(index, error)
            return None

    def reason(self, index: int) -> str:
        """A sentence about a question that has no prompt."""
        unknown = f"{self._name(index)} could not be read by another process"
        return (
            f"{self.reasons.get(index, unknown)}: fix the file, or leave it out (--allow-missing)."
        )

    def _note(self, index: int, error: BadImage) -> None:
        self.reasons[index] = f"{self._name(index)}: {str(error).rstrip('.')}"

    def _name(self, index: int) -> str:
        question = self.questions[index]
        return f"question {question.id!r} of {question.benchmark}"

    def _video(self, path: Path) -> Video:
        with self._decoding:
            return self._open(path)

    def _video_size(self, path: Path) -> tuple[int, int, int]:
        with self._decoding:
            return self._measure(path)

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

_VIDEOS = 2  # kept decoded: questions about one are together


class PromptLoader:
    """Reads what questions show, and makes their prompts; threads may share it.

    Attributes:
      reasons: why a question has no prompt, by place.

    Args:
      questions: of one benchmark.
      asked: the same in a style's words.
      processor: makes prompts.
      frames: most frames of a video.
      most: most tokens of a prompt.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        asked: Sequence[BenchmarkPrompt],
        processor: Processor,
        frames: int,
        most: int,
    ):
        self.questions, self.asked = questions, asked
        self.processor, self.most = processor, most
        self.reasons: dict[int, str] = {}
        self._decoding = threading.Lock()  # one video at a time, which has threads of its own
        self._open = lru_cache(_VIDEOS)(lambda path: open_video(path, FPS, frames))
        self._sizes = lru_cache(None)(lambda path: measure_video(path, FPS, frames))

    def measure(self, pool: Executor) -> dict[int, PromptSize]:
        """The sizes of all prompts that every process can make, by place, from headers alone.

        Raises:
          UserError: a prompt is too long.
        """
        places = range(len(self.asked))
        found = list(pool.map(self._measure, places))
        here = np.array([extent is not None for extent in found])
        everywhere = all_gather(here).reshape(-1, len(found)).all(axis=0)
        return {place: found[place] for place in places if everywhere[place]}

    def _measure(self, place: int) -> PromptSize | None:
        asked = self.asked[place]
        try:
            sizes = [picture.size() for picture in asked.pictures]
            videos = [self._size(asked.video)] if asked.video else []
            extent = self.processor.measure(sizes, asked.text, videos)
        except BadImage as error:
            self._note(place, error)
            return None
        except UserError as error:
            raise UserError(f"{self._name(place)}: {error}") from None
        if extent.tokens > self.most:
            raise UserError(
                f"{self._name(place)} takes {extent.tokens} tokens with its images, but at most "
                f"{self.most} fit: lower --max-pixels or --max-frames."
            )
        return extent

    def prompt(self, place: int) -> Prompt | None:
        """A question's prompt; None where it cannot be made, and `reasons` says why."""
        asked = self.asked[place]
        try:
            images = [picture.open() for picture in asked.pictures]
            videos = [self._video(asked.video)] if asked.video else []
            return self.processor.prompt(asked.text, images, videos)
        except BadImage as error:
            self._note(place, error)
            return None

    def reason(self, place: int) -> str:
        """A sentence about a question that has no prompt."""
        unknown = f"{self._name(place)} could not be read by another process"
        return (
            f"{self.reasons.get(place, unknown)}: fix the file, or leave it out (--allow-missing)."
        )

    def _note(self, place: int, error: BadImage) -> None:
        self.reasons[place] = f"{self._name(place)}: {str(error).rstrip('.')}"

    def _name(self, place: int) -> str:
        question = self.questions[place]
        return f"question {question.id!r} of {question.benchmark}"

    def _video(self, path: Path) -> Video:
        with self._decoding:
            return self._open(path)

    def _size(self, path: Path) -> tuple[int, int, int]:
        with self._decoding:
            return self._sizes(path)

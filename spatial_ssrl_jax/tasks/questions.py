"""Questions of one's own as a task: its weight in the mixture; `questions:` sources make them."""

from dataclasses import dataclass

import numpy as np

from spatial_ssrl_jax.common.bounds import NonNegative
from spatial_ssrl_jax.tasks.example import Example, Reject, Task
from spatial_ssrl_jax.tasks.record import Record


@dataclass(frozen=True)
class QuestionSettings:
    """Settings of the questions of one's own.

    Attributes:
      weight: of the questions in the training mixture, beside those of the pretext tasks, which are
        81,053 in all.
    """

    weight: NonNegative = 20000.0


def make(record: Record, rng: np.random.Generator, settings: QuestionSettings) -> Example:
    """No image gives one."""
    raise Reject("no question of one's own")


TASK = Task("questions", False, QuestionSettings, make)

"""The pretext tasks.

A new one is a file with a `TASK` and an entry in this tuple, or one of a config's `extra_tasks`.
"""

from typing import Any

from spatial_ssrl_jax.tasks import crop, depth, flip, position, shuffle
from spatial_ssrl_jax.tasks.example import Task

TASKS: tuple[Task[Any], ...] = (shuffle.TASK, flip.TASK, crop.TASK, depth.TASK, position.TASK)
TASKS_BY_NAME = {task.name: task for task in TASKS}

"""Scoring the responses of a step, in other processes where that may be slow or never end."""

import multiprocessing
import queue
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import jax

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.processes import end_with_parent
from spatial_ssrl_jax.common.text import error_line
from spatial_ssrl_jax.config.schema import RewardSettings
from spatial_ssrl_jax.parallel.collectives import all_sum
from spatial_ssrl_jax.rl.rewards import Reward, score_answer, score_response
from spatial_ssrl_jax.tasks import TASKS
from spatial_ssrl_jax.tasks.example import Example, Grade, Task

_START_SECONDS = 120  # for a worker to import what it needs


@dataclass(frozen=True)
class SampledGroup:
    """The responses to one example, and their lengths in tokens."""

    example: Example
    texts: Sequence[str]
    lengths: Sequence[int]


class Scorer:
    """Rewards of responses.

    Args:
      settings: the config's `reward` section.
      grades: by the name of a task that grades its answers.
    """

    def __init__(self, settings: RewardSettings, grades: Mapping[str, Grade]):
        self.settings, self._grades = settings, grades
        self._in_workers = settings.function is not None or settings.needs_math_verify
        self._workers: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None

    def score(self, groups: Sequence[SampledGroup]) -> list[list[Reward]]:
        """The rewards of each group's responses.

        Raises:
          UserError: more of them failed than `reward.max_failed_fraction`, over all processes; or
            the function cannot be sent to workers.
        """
        if not self._in_workers:
            return [
                [
                    score_response(
                        text, length, group.example, self.settings, self._grade(group.example)
                    )
                    for text, length in zip(group.texts, group.lengths, strict=True)
                ]
                for group in groups
            ]
        if self._threads is None:
            self._start()
        assert self._threads is not None
        rewards = list(self._threads.map(self._score_group, groups))
        self._check_failures(rewards)
        return rewards

    def close(self) -> None:
        """Ends the workers, also those that are scoring."""
        for worker in self._workers:
            worker.end()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()
        self._workers, self._threads, self._idle = [], None, queue.SimpleQueue()

    def _grade(self, example: Example) -> Grade | None:
        return self._grades.get(example.task)

    def _start(self) -> None:
        try:
            program = cloudpickle.dumps((self.settings, dict(self._grades)))
        except Exception as error:  # of any object that the user's code holds
            raise UserError(
                "reward.function cannot be sent to other processes "
                f"({type(error).__name__}: {error_line(error)}): make what it holds inside of it."
            ) from error
        for _ in range(self.settings.workers):
            self._workers.append(_Worker(program))
            self._idle.put(self._workers[-1])
        self._threads = ThreadPoolExecutor(self.settings.workers, "rewards")

    def _score_group(self, group: SampledGroup) -> list[Reward]:
        """One group by one worker, which is replaced when a response takes too long."""
        worker, rewards = self._idle.get(), list[Reward]()
        # Pixels would take longer to send than most rewards to compute.
        example = replace(group.example, images=())
        try:
            for text, length in zip(group.texts, group.lengths, strict=True):
                found = worker.score((text, length, example), self.settings.timeout)
                if isinstance(found, str):
                    record = example.source.get("record", example.task)
                    failure = f"{found} (a response to {record})"
                    found = replace(self._without(text, example), failure=failure)
                rewards.append(found)
        finally:
            self._idle.put(worker)
        return rewards

    def _without(self, text: str, example: Example) -> Reward:
        """Of a response whose reward failed: 0, with its format for the metrics."""
        rule = replace(self.settings, rule="paper", question_rule="same", partial_credit=False)
        return Reward(0.0, 0.0, score_answer(text, example.answer, rule).format)

    def _check_failures(self, rewards: list[list[Reward]]) -> None:
        failures = [reward.failure for group in rewards for reward in group if reward.failure]
        failed, total = all_sum(len(failures)), all_sum(sum(map(len, rewards)))
        if failed > self.settings.max_failed_fraction * total:
            first = failures[0] if failures else "they are named by another process"
            raise UserError(
                f"{failed:.0f} of {total:.0f} responses have no reward; the first: {first}: fix "
                "reward.function, or raise reward.timeout or reward.max_failed_fraction."
            )


def make_scorer(settings: RewardSettings, tasks: Sequence[Task[Any]] = TASKS) -> Scorer:
    """A scorer with the grades of the tasks that have one."""
    return Scorer(settings, {task.name: task.grade for task in tasks if task.grade is not None})


class _Worker:
    """A process that scores one response at a time; started again when it hangs or dies.

    Args:
      program: pickled settings and grades.
    """

    def __init__(self, program: bytes):
        self._program, self._ended = program, False
        self._spawn()

    def score(self, job: tuple[str, int, Example], seconds: float) -> Reward | str:
        """The reward, or why there is none."""
        if self._ended:
            return "the run ends"
        if not self._ready:  # a start is not counted as time for a response
            if not self._pipe.poll(_START_SECONDS):
                return self._replace("its process does not start")
            try:
                self._ready = self._pipe.recv()
            except EOFError:
                return self._replace("its process ends at the start")
        try:
            self._pipe.send_bytes(cloudpickle.dumps(job))
            if not self._pipe.poll(seconds):
                return self._replace(f"it takes more than {seconds:g} s")
            return self._pipe.recv()
        except (EOFError, OSError):
            return self._replace("its process ends")

    def end(self) -> None:
        """Ends the process while another thread may wait for it."""
        self._ended = True
        self._process.kill()

    def stop(self) -> None:
        """Ends the process; no thread waits for it."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _replace(self, why: str) -> str:
        if not self._ended:
            self.stop()
            self._spawn()
        return why

    def _spawn(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._program), daemon=True)
        self._process.start()
        theirs.close()
        self._ready = False


def _serve(pipe: "Connection[Any, Any]", program: bytes) -> None:
    """A worker's loop: receives a response and sends its reward, or why it failed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run ends its workers
    end_with_parent()  # also where the function never returns
    jax.config.update("jax_platforms", "cpu")  # the run holds the accelerators
    settings, grades = cloudpickle.loads(program)
    pipe.send(True)
    while True:
        try:
            text, length, example = cloudpickle.loads(pipe.recv_bytes())
        except EOFError:  # the run has ended
            return
        try:
            found = score_response(text, length, example, settings, grades.get(example.task))
        except Exception as error:  # a program of the user's, which may raise any
            found = f"{type(error).__name__}: {error_line(error)}"
        pipe.send(found)

"""Runs a model over a benchmark's questions in batches; each batch's answers are stored at once."""

import dataclasses
import time
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.batching import pad_prompts
from spatial_ssrl_jax.data.processor import Processor, Prompt, PromptSize
from spatial_ssrl_jax.eval.batches import QuestionBatch, attention_chunk, plan_batches
from spatial_ssrl_jax.eval.benchmarks.registry import Benchmark, judge_prediction
from spatial_ssrl_jax.eval.options import BenchmarkOptions, EvalOptions
from spatial_ssrl_jax.eval.prediction_log import PredictionStore
from spatial_ssrl_jax.eval.prompt_loader import PromptLoader
from spatial_ssrl_jax.eval.questions import SAMPLE, Prediction, Question, unscored_prediction
from spatial_ssrl_jax.inference.policy import Policy, check_finite, finite_rows
from spatial_ssrl_jax.monitoring.progress import Progress
from spatial_ssrl_jax.parallel.collectives import all_gather
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.rollout.engine import Engine

_THREADS = 8

PromptFutures = dict[int, Future[Prompt | None]]  # by the question's index


def run_benchmark(
    policy: Policy,
    benchmark: Benchmark,
    options: EvalOptions,
    store: PredictionStore,
    progress: Progress,
    allow_missing: bool = False,
) -> tuple[list[Prediction], list[str]]:
    """Asks every question that the store has no answer to; every process calls it.

    Args:
      policy: the model.
      benchmark: the questions.
      options: style, sampling and limits.
      store: keeps the predictions; only the primary process writes.
      progress: shows how many questions are answered.
      allow_missing: leave out questions whose image or video cannot be read.

    Returns:
      All predictions in the order of the questions, judged where a target is known (none on
      processes that do not write); and why questions were left out.

    Raises:
      UserError: an image or video cannot be read, a prompt is too long, or the store has
        answers to other questions.
    """
    resolved, questions = options.of(benchmark.spec), benchmark.questions
    loader = _prompt_loader(policy, benchmark, resolved)
    done = store.answered(questions, loader.prompts, resolved.samples)
    progress.doing(f"measuring {len(questions)} questions of {benchmark.spec.title}")
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = loader.sizes(pool)
        missing = set(range(len(questions))) - sizes.keys()
        _check_missing(loader, missing, allow_missing)
        batches = _batches(loader, sizes, policy.layout, resolved.batch_prompts)
        todo = [batch for batch in batches if not done[list(batch.indices)].all()]
        counter = _ProgressCounter(
            progress, benchmark.name, len(sizes), int(done[list(sizes)].sum())
        )
        for batch, futures in _prefetched(pool, loader, todo):
            tokens, length, failed = _respond(policy, loader, batch, futures, resolved)
            rows = [row for row, index in enumerate(batch.indices) if not done[index]]
            predictions = [
                _prediction(loader, batch.indices[row], k, resolved.samples, ids[: length[row, k]])
                for row in rows
                if not failed[row]
                for k, ids in enumerate(tokens[row])
            ]
            store.add(predictions)
            counter.add(len(rows), predictions, length[: len(batch.indices)])
            missing |= {index for row, index in enumerate(batch.indices) if failed[row]}
            _check_missing(loader, missing, allow_missing)
    left_out = [loader.reason(index) for index in sorted(missing)]
    return in_order(store.predictions, questions), left_out


def _prompt_loader(policy: Policy, benchmark: Benchmark, options: BenchmarkOptions) -> PromptLoader:
    config = policy.engine.config
    return PromptLoader(
        benchmark.questions,
        [benchmark.prompt(question, options.style) for question in benchmark.questions],
        Processor(policy.processor.folder, config, options.min_pixels, options.max_pixels),
        options.frames,
        config.text.max_position_embeddings - options.new_tokens,
    )


def _check_missing(loader: PromptLoader, missing: set[int], allow_missing: bool) -> None:
    """Raises `UserError` where questions have no prompt and must, or none has one."""
    if missing and (not allow_missing or len(missing) == len(loader.questions)):
        raise UserError(loader.reason(min(missing)))


def _batches(
    loader: PromptLoader, sizes: Mapping[int, PromptSize], layout: Layout, max_rows: int
) -> list[QuestionBatch]:
    """Batches of all questions, answered ones too: a resumed run has those of a whole one."""
    indices = list(sizes)
    videos = [str(loader.prompts[index].video or "") for index in indices]
    planned = plan_batches(list(sizes.values()), layout.batch_shards, max_rows, videos)
    return [dataclasses.replace(b, indices=tuple(indices[i] for i in b.indices)) for b in planned]


def _prefetched(
    pool: ThreadPoolExecutor, loader: PromptLoader, batches: Sequence[QuestionBatch]
) -> Iterator[tuple[QuestionBatch, PromptFutures]]:
    """Each batch with this process's prompts; those of the next batch are loaded meanwhile."""
    waiting: deque[tuple[QuestionBatch, PromptFutures]] = deque()
    for batch in batches:
        own = dict.fromkeys(_own_indices(batch))
        waiting.append((batch, {index: pool.submit(loader.load, index) for index in own}))
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def _own_indices(batch: QuestionBatch) -> list[int]:
    """Questions of this process's rows; rows after the last question repeat it."""
    rows = batch.size // jax.process_count()
    indices = [*batch.indices, *[batch.indices[-1]] * (batch.size - len(batch.indices))]
    return indices[rows * jax.process_index() :][:rows]


def _respond(
    policy: Policy,
    loader: PromptLoader,
    batch: QuestionBatch,
    futures: PromptFutures,
    options: BenchmarkOptions,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Responses to a batch, from all processes.

    Returns:
      [size, samples, R] int32 tokens, [size, samples] int32 lengths, and [size] bool, which
      questions could not be read.

    Raises:
      UserError: a log-probability is not finite.
    """
    loaded = {index: future.result() for index, future in futures.items()}
    own = _own_indices(batch)
    failed = np.array([loaded[index] is None for index in own])
    # A row without a prompt repeats another one's, so that both end together.
    spare = next((index for index in loaded if loaded[index] is not None), None)
    rows = [spare if loaded[index] is None else index for index in own]
    prompts = [None if index is None else loaded[index] for index in rows]
    padded = pad_prompts(
        [loader.processor.prompt("-") if prompt is None else prompt for prompt in prompts],
        batch.shape.tokens,
        batch.shape.patches,
    )
    keys = [0 if index is None else _key(loader.questions[index]) for index in rows]
    engine = _engine(policy, batch)
    step = engine.check_every
    rollout = engine.generate(
        policy.params,
        policy.weights,
        [policy.layout.put_batch(padded)],
        group_size=options.samples,
        max_new_tokens=-(-options.new_tokens // step) * step,
        key=jax.random.key(options.seed),
        prompt_index=[policy.layout.put_batch(np.array(keys, np.int32))],
        sampling=options.sampling,
    )
    length = np.minimum(rollout.length, options.new_tokens)
    *responses, finite = all_gather((rollout.tokens, length, failed, finite_rows(rollout)))
    check_finite(finite, policy.engine.compute.dtype)
    tokens, length, failed = responses
    return tokens, length, failed


def _engine(policy: Policy, batch: QuestionBatch) -> Engine:
    """The engine, with a smaller attention chunk where prompts are long."""
    engine, rows = policy.engine, batch.size // policy.layout.batch_shards
    chunk = attention_chunk(engine.config, batch.shape, rows, engine.compute.attention_chunk)
    return dataclasses.replace(
        engine, compute=dataclasses.replace(engine.compute, attention_chunk=chunk)
    )


def _key(question: Question) -> int:
    """The index that a question's draws follow from: by its id, not its place among others."""
    return zlib.crc32(question.id.encode()) & 0x7FFFFFFF


def _prediction(
    loader: PromptLoader, index: int, sample: int, samples: int, ids: np.ndarray
) -> Prediction:
    question, text = loader.questions[index], loader.processor.decode(ids)
    number = sample + 1 if samples > 1 else None
    return judge_prediction(unscored_prediction(question, loader.prompts[index], text, number))


def in_order(predictions: Sequence[Prediction], questions: Sequence[Question]) -> list[Prediction]:
    """Predictions in the order of the questions."""
    order = {question.id: index for index, question in enumerate(questions)}
    return sorted(predictions, key=lambda p: (order[p.id], p.meta.get(SAMPLE, 1)))


class _ProgressCounter:
    """Reports how many questions are answered, and the accuracy so far."""

    def __init__(self, progress: Progress, name: str, total: int, done: int):
        self.progress, self.done = progress, done
        self.scores: list[float] = []
        progress.start(name, total, done)
        if done < total:
            progress.doing("compiling the programs of the first batch")
        self.last = time.monotonic()

    def add(self, count: int, predictions: Sequence[Prediction], length: np.ndarray) -> None:
        """Counts `count` more questions; `length` [b, samples] is the responses' tokens."""
        now, self.done = time.monotonic(), self.done + count
        self.scores += [p.score for p in predictions if p.score is not None]
        metrics = {
            "response/length_mean": float(length.mean()),
            "perf/tokens_per_second": float(length.sum()) / (now - self.last),
        }
        if self.scores:
            metrics["reward/accuracy_mean"] = float(np.mean(self.scores))
        self.last = now
        self.progress.step(self.done, metrics)

"""Asking a model a benchmark's questions, in batches over the mesh; answers are kept at once."""

import dataclasses
import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.batching import pad_prompts
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.data.videos import MAX_FRAMES
from spatial_ssrl_jax.eval.batches import QuestionBatch, plan_batches, queries_at_a_time
from spatial_ssrl_jax.eval.benchmarks.prompts import Style
from spatial_ssrl_jax.eval.benchmarks.registry import Benchmark, judge_prediction
from spatial_ssrl_jax.eval.benchmarks.spec import BenchmarkSpec
from spatial_ssrl_jax.eval.loader import PromptLoader
from spatial_ssrl_jax.eval.prediction_log import PredictionLog
from spatial_ssrl_jax.eval.questions import SAMPLE, Prediction, Question, unscored_prediction
from spatial_ssrl_jax.inference.policy import Policy
from spatial_ssrl_jax.monitoring.progress import Progress
from spatial_ssrl_jax.parallel.collectives import all_gather
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.rollout.engine import Engine
from spatial_ssrl_jax.rollout.sampling import GREEDY, Sampling

_THREADS = 8


@dataclass(frozen=True)
class EvalOptions:
    """How questions are asked; what is None is as the published numbers were taken.

    Attributes:
      style: in whose words.
      sampling: how tokens are drawn.
      samples: responses to each question.
      seed: of the draws.
      prompts: most prompts at a time on each part that the mesh cuts a batch into.
      new_tokens: most tokens of a response.
      min_pixels, max_pixels: area of an image or of a video's frame.
      frames: most frames of a video.
    """

    style: Style = "direct"
    sampling: Sampling = GREEDY
    samples: int = 1
    seed: int = 0
    prompts: int = 16
    new_tokens: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    frames: int | None = None

    def of(self, spec: BenchmarkSpec) -> "EvalOptions":
        """The same, with a benchmark's own settings where there is None."""
        least, most = spec.pixels or (None, None)
        return dataclasses.replace(
            self,
            new_tokens=self.new_tokens or spec.new_tokens,
            min_pixels=self.min_pixels or least,
            max_pixels=self.max_pixels or most,
            frames=self.frames or spec.frames or MAX_FRAMES,
        )

    def about(self) -> dict[str, Any]:
        """What decides the answers, for `asked.json`; how many are asked at a time does not."""
        values = dataclasses.asdict(self)
        del values["prompts"]
        return values | values.pop("sampling")


def run_benchmark(
    respondent: Policy,
    benchmark: Benchmark,
    how: EvalOptions,
    journal: PredictionLog,
    progress: Progress,
    allow_missing: bool = False,
) -> tuple[list[Prediction], list[str]]:
    """Asks every question that the journal has no answer to.

    Every process calls it, and the one that writes keeps the journal.

    Args:
      respondent: the model.
      benchmark: the questions.
      how: words, sampling and limits.
      journal: where answers are kept.
      progress: shows how far it is.
      allow_missing: leave out questions whose image or video cannot be read.

    Returns:
      All answers in the order of the questions, judged where a target is known; on processes that
      do not write, none. And why questions were left out.

    Raises:
      UserError: an image or video cannot be read, a prompt is too long, or the journal has
        answers to other questions.
    """
    how, questions = how.of(benchmark.spec), benchmark.questions
    reader = _reader(respondent, benchmark, how)
    done = journal.answered(questions, reader.asked, how.samples)
    progress.doing(f"measuring {len(questions)} questions of {benchmark.spec.title}")
    with ThreadPoolExecutor(_THREADS) as pool:
        extents = reader.measure(pool)
        missing = set(range(len(questions))) - extents.keys()
        _check_read(reader, missing, allow_missing)
        batches = _batches(reader, extents, respondent.layout, how.prompts)
        todo = [batch for batch in batches if not done[list(batch.places)].all()]
        tally = _Tally(progress, benchmark.name, len(extents), int(done[list(extents)].sum()))
        for batch, prompts in _ahead(pool, reader, todo):
            tokens, length, failed = _respond(respondent, reader, batch, prompts, how)
            asked = [i for i, place in enumerate(batch.places) if not done[place]]
            records = [
                _record(reader, batch.places[i], k, how.samples, tokens[i, k, : length[i, k]])
                for i in asked
                if not failed[i]
                for k in range(how.samples)
            ]
            journal.add(records)
            tally.add(len(asked), records, length[: len(batch.places)])
            missing |= {place for i, place in enumerate(batch.places) if failed[i]}
            _check_read(reader, missing, allow_missing)
    left_out = [reader.reason(place) for place in sorted(missing)]
    return in_order(journal.records, questions), left_out


def _reader(respondent: Policy, benchmark: Benchmark, how: EvalOptions) -> PromptLoader:
    config = respondent.engine.config
    return PromptLoader(
        benchmark.questions,
        [benchmark.prompt(question, how.style) for question in benchmark.questions],
        Processor(respondent.files, config, how.min_pixels, how.max_pixels),
        how.frames,
        config.text.max_position_embeddings - how.new_tokens,
    )


def _check_read(reader: PromptLoader, missing: set[int], allow_missing: bool) -> None:
    """Refuses questions that could not be read, or that none could be.

    Raises:
      UserError: names the first one.
    """
    if missing and (not allow_missing or len(missing) == len(reader.questions)):
        raise UserError(reader.reason(min(missing)))


def _batches(reader: PromptLoader, extents: dict, layout: Layout, most: int) -> list[QuestionBatch]:
    """The batches of all questions, answered ones too: a resumed run has those of a whole one."""
    places = list(extents)
    videos = [str(reader.asked[place].video or "") for place in places]
    planned = plan_batches(list(extents.values()), layout.batch_shards, most, videos)
    return [dataclasses.replace(b, places=tuple(places[i] for i in b.places)) for b in planned]


def _ahead(
    pool: ThreadPoolExecutor, reader: PromptLoader, batches: Sequence[QuestionBatch]
) -> Iterator[tuple[QuestionBatch, dict[int, Future]]]:
    """Each batch with this process's prompts; the next batch's are made meanwhile."""
    waiting: deque = deque()
    for batch in batches:
        mine = dict.fromkeys(_own(batch))
        waiting.append((batch, {place: pool.submit(reader.prompt, place) for place in mine}))
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def _own(batch: QuestionBatch) -> list[int]:
    """Questions of this process's rows; rows after the last question repeat it."""
    share = batch.size // jax.process_count()
    places = [*batch.places, *[batch.places[-1]] * (batch.size - len(batch.places))]
    return places[share * jax.process_index() :][:share]


def _respond(
    respondent: Policy,
    reader: PromptLoader,
    batch: QuestionBatch,
    prompts: dict[int, Future],
    how: EvalOptions,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Answers to a batch, from all processes.

    Returns:
      Tokens [size, samples, R], their number [size, samples], and [size] bool, which questions
      could not be read.
    """
    found = {place: future.result() for place, future in prompts.items()}
    failed = np.array([found[place] is None for place in _own(batch)])
    # A row without a prompt asks what another one asks, so that both end together.
    spare = next((place for place in found if found[place] is not None), None)
    rows = [spare if found[place] is None else place for place in _own(batch)]
    padded = pad_prompts(
        [reader.processor.prompt("-") if place is None else found[place] for place in rows],
        (batch.shape.tokens,),
        (batch.shape.windows,),
    )
    keys = [0 if place is None else _key(reader.questions[place]) for place in rows]
    engine = _engine(respondent, batch)
    step = engine.check_every
    rollout = engine.generate(
        respondent.params,
        respondent.weights,
        respondent.layout.put_batch(padded),
        group_size=how.samples,
        max_new_tokens=-(-how.new_tokens // step) * step,
        key=jax.random.key(how.seed),
        prompt_index=respondent.layout.put_batch(np.array(keys, np.int32)),
        sampling=how.sampling,
    )
    return all_gather((rollout.tokens, np.minimum(rollout.length, how.new_tokens), failed))


def _engine(respondent: Policy, batch: QuestionBatch) -> Engine:
    """The engine, which takes fewer queries at a time where prompts are long."""
    engine, rows = respondent.engine, batch.size // respondent.layout.batch_shards
    chunk = queries_at_a_time(engine.config, batch.shape, rows, engine.compute.attention_chunk)
    return dataclasses.replace(
        engine, compute=dataclasses.replace(engine.compute, attention_chunk=chunk)
    )


def _key(question: Question) -> int:
    """What the draws of a question follow from: its name, not its place among others."""
    return zlib.crc32(question.id.encode()) & 0x7FFFFFFF


def _record(
    reader: PromptLoader, place: int, sample: int, samples: int, ids: np.ndarray
) -> Prediction:
    question, text = reader.questions[place], reader.processor.decode(ids)
    number = sample + 1 if samples > 1 else None
    return judge_prediction(unscored_prediction(question, reader.asked[place], text, number))


def in_order(records: Sequence[Prediction], questions: Sequence[Question]) -> list[Prediction]:
    """Answers in the order of the questions."""
    order = {question.id: place for place, question in enumerate(questions)}
    return sorted(records, key=lambda r: (order[r.id], r.meta.get(SAMPLE, 1)))


class _Tally:
    """Tells the progress how many questions are answered, and how well so far."""

    def __init__(self, progress: Progress, name: str, total: int, done: int):
        self.progress, self.done, self.scores = progress, done, []
        progress.start(name, total, done)
        if done < total:
            progress.doing("compiling the programs of the first batch")
        self.last = time.monotonic()

    def add(self, count: int, records: Sequence[Prediction], length: np.ndarray) -> None:
        """`count` more questions were asked; `length` [b, samples] are tokens of the responses."""
        now, self.done = time.monotonic(), self.done + count
        self.scores += [record.score for record in records if record.score is not None]
        figures = {
            "response/length_mean": float(length.mean()),
            "perf/tokens_per_second": float(length.sum()) / (now - self.last),
        }
        if self.scores:
            figures["reward/accuracy_mean"] = float(np.mean(self.scores))
        self.last = now
        self.progress.step(self.done, figures)

"""One step of each stage, as the training loop calls it: data in, new weights and metrics out."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TypeVar

import jax
import numpy as np
import optax

from spatial_ssrl_jax.data.pipeline import Batch, batch_at
from spatial_ssrl_jax.parallel.collectives import all_sum
from spatial_ssrl_jax.perf.mfu import useful_flops
from spatial_ssrl_jax.qwen_vl.param_tree import Params
from spatial_ssrl_jax.rl.bucketing import Buckets
from spatial_ssrl_jax.rl.grpo import Grpo
from spatial_ssrl_jax.rl.losses import scheduled_kl_coef
from spatial_ssrl_jax.rl.row_shapes import row_shapes
from spatial_ssrl_jax.rl.sft import encode_responses, pack_step
from spatial_ssrl_jax.rl.stages import GrpoStage, SftStage
from spatial_ssrl_jax.rl.step_metrics import gather_ordered, prompt_metrics, prompt_rows
from spatial_ssrl_jax.rl.train_step import TrainState, train_step
from spatial_ssrl_jax.trainer.context import Run, items_of
from spatial_ssrl_jax.trainer.run_log import Sampled

_RESAMPLE_SEED = 1_000_001  # apart from the seeds of both stages
Made = TypeVar("Made")

# (number in the stage from 0, state, batch) -> new state, metrics, samples of a GRPO step.
Step = Callable[[int, TrainState, Batch], tuple[TrainState, dict[str, float], Sampled | None]]


def sft_step(run: Run, stage: SftStage, optimizer: optax.GradientTransformation) -> Step:
    """Makes SFT's step: packs the examples of a batch and trains on them."""
    settings, rates = stage.settings, stage.learning_rate()
    loss = stage.loss(run.model.config, run.compute)
    shapes = row_shapes(run.config, stage, run.compute.attention)

    def step(
        number: int, state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, float], None]:
        begun = time.perf_counter()
        responses = encode_responses(batch.items, run.processor, run.config.rollout.max_new_tokens)
        packed = pack_step(batch, responses, shapes, settings.micro_batch_rows, run.model.config)
        rate = float(np.asarray(rates(number)))
        micro_batches = _before_programs(map(run.layout.put_batch, packed), run.gap.end)
        state, metrics = train_step(loss, optimizer, state, micro_batches)
        metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
        run.gap.begin()
        seconds = time.perf_counter() - begun
        length = np.array([len(response) for response in responses])
        rows = gather_ordered(prompt_rows(batch) | {"length": length})
        tokens = int(rows["prompt_length"].sum() + rows["length"].sum())
        more = {
            "optim/learning_rate": rate,
            "response/length_mean": float(rows["length"].mean()),
            "perf/update_padding_share": 1 - tokens / all_sum(packed.padded_tokens),
            "perf/update_seconds": seconds,
            "perf/tokens_per_second": tokens / seconds,
            "perf/useful_flops": useful_flops(
                run.model.config, settings, batch.prompts, length[:, None]
            ),
        }
        return state, metrics | prompt_metrics(rows) | more, None

    return step


def _before_programs(batches: Iterable[Made], call: Callable[[], None]) -> Iterator[Made]:
    """The batches; calls a function once each is made, before its programs are."""
    for batch in batches:
        call()
        yield batch


def grpo_step(
    run: Run,
    stage: GrpoStage,
    optimizer: optax.GradientTransformation,
    reference: Params | None,
) -> Step:
    """Makes GRPO's step: a rollout and its updates, with the KL to `reference`."""
    config, settings, rates = run.config, stage.settings, stage.learning_rate()
    grpo = Grpo(
        settings,
        replace(config.rollout, batch_prompts=run.rollout_prompts),
        run.scorer,
        run.engine,
        stage.loss(run.model.config, run.compute),
        optimizer,
        run.layout,
        Buckets.of(config),
        row_shapes(config, stage, run.compute.attention),
        run.processor,
        reference,
        run.ahead,
        run.gap,
    )
    key = jax.random.key(config.seed)

    def step(
        number: int, state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, float], Sampled]:
        rate = float(np.asarray(rates(number * settings.minibatches_per_rollout)))
        resample = partial(_resample, run, stage, number)
        kl_coef = scheduled_kl_coef(settings, number)
        state, metrics, trained_on, scored = grpo.step(
            state, batch, jax.random.fold_in(key, number), resample, kl_coef
        )
        needed = useful_flops(
            run.model.config, settings, trained_on.prompts, scored.rollout.length, scored.updated
        )
        more = {"optim/learning_rate": rate, "perf/useful_flops": needed}
        if kl_coef is not None:
            more["kl/coef"] = float(kl_coef)
        return state, metrics | more, (trained_on, scored)

    return step


def _resample(run: Run, stage: GrpoStage, step: int, number: int) -> Batch:
    """The prompts of resample `number`, from 1, of a GRPO step, from a separate stream."""
    return batch_at(
        items_of(run, run.config.seed * 2 + _RESAMPLE_SEED, run.source, run.split.train),
        stage.settings.prompts,
        stage.update_prompts,
        step * stage.settings.max_resamples + number - 1,
        process=jax.process_index(),
        processes=jax.process_count(),
    )

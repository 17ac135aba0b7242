"""The jitted programs of a run's stages with abstract arguments.

They are the functions that training calls. A program that takes another's result is given its
shapes with the shardings that the compiler chose, as in training, where nothing moves them.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import ShapeDtypeStruct

from spatial_ssrl_jax.config.schema import Config, GrpoSettings, StageSettings
from spatial_ssrl_jax.data.packing import Content, RowShape
from spatial_ssrl_jax.data.processor import PromptSize
from spatial_ssrl_jax.parallel.sharding import Layout, shard_bytes
from spatial_ssrl_jax.perf.response_lengths import ResponseLengths
from spatial_ssrl_jax.planning.abstract_batches import AbstractBatches
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.inputs import VisionInput
from spatial_ssrl_jax.qwen_vl.lora import drop_adapters
from spatial_ssrl_jax.qwen_vl.param_tree import Params, merge_params
from spatial_ssrl_jax.rl.batch import GroupBatch, PackedBatch
from spatial_ssrl_jax.rl.bucketing import BatchShape
from spatial_ssrl_jax.rl.logprobs import logprobs_of, vision_features
from spatial_ssrl_jax.rl.losses import GrpoLoss, SftLoss
from spatial_ssrl_jax.rl.placement import (
    abstract_stage_state,
    cache_bytes,
    compute_settings,
    prefill_prompts,
    rollout_prompts,
)
from spatial_ssrl_jax.rl.row_shapes import pack_micro_batches, row_shapes
from spatial_ssrl_jax.rl.stages import GrpoStage, SftStage, stages
from spatial_ssrl_jax.rl.train_step import (
    TrainState,
    add_gradients,
    apply_gradients,
    gradient_shardings,
    micro_gradients,
    param_shardings,
)
from spatial_ssrl_jax.rollout.cache import DecodeState, Prefix
from spatial_ssrl_jax.rollout.decode import (
    DecodeSettings,
    DecodeWeights,
    decode_chunk,
    decode_weight_shardings,
    decode_weights,
    grow_layer,
    initial_samples,
    prefill_program,
    reshard_program,
)
from spatial_ssrl_jax.rollout.sampling import Sampling
from spatial_ssrl_jax.rollout.schedule import DecodeShape, Schedule

_SIMULATED = 20  # rollouts, whose mean the times of decoding are

# Bytes of each device by what takes them.
Held = dict[str, int]


@dataclass(frozen=True)
class PlannedProgram:
    """One program of a step.

    Attributes:
      name: unique in its run.
      function: jitted.
      args: its arguments, arrays as `jax.ShapeDtypeStruct`s.
      runs: how often a step calls it.
      beside: bytes of each device that are in use while it runs, by what takes them, without its
        own arguments.
      setting: what to lower if it does not fit.
      trip_count: of the loop whose length depends on data.
    """

    name: str
    function: jax.stages.Wrapped
    args: tuple[Any, ...]
    runs: float
    beside: Held
    setting: str
    trip_count: float = 1.0


# Yields programs and is sent the shapes of their results, None where a program did not compile.
PlannedPrograms = Generator[PlannedProgram, Any, None]


@dataclass(frozen=True)
class RolloutLengths:
    """What steps are planned with beside the longest of all.

    Attributes:
      responses: their lengths.
      prompt: size of each prompt.
      bucket: what it is padded to in prefill and in its cache.
    """

    responses: ResponseLengths
    prompt: PromptSize
    bucket: BatchShape


@dataclass(frozen=True)
class PlannedStage:
    """A stage's programs.

    Attributes:
      name: `sft` or `grpo`.
      programs: in the order in which a step runs them.
      tokens: of a step's prompts and responses: the longest of all, or with lengths the mean.
    """

    name: str
    programs: PlannedPrograms
    tokens: float


def planned_stages(
    config: Config,
    model: QwenVLConfig,
    layout: Layout,
    rollout_layout: Layout,
    memory: int | None,
    lengths: RolloutLengths | None = None,
) -> list[PlannedStage]:
    """The programs of the stages that a config has.

    Args:
      config: the run.
      model: the model's shape.
      layout, rollout_layout: for training, and for sampling.
      memory: bytes of a device; None where not known.
      lengths: of a GRPO step's prompts and responses; None is the longest of all.
    """
    planned = _Planned(
        config,
        model,
        layout,
        rollout_layout,
        compute_settings(config, layout),
        rollout_prompts(config, model, layout, rollout_layout, memory),
        lengths,
    )
    return [planned.stage(stage) for stage in stages(config)]


@dataclass(frozen=True)
class _Planned:
    config: Config
    model: QwenVLConfig
    layout: Layout
    rollout_layout: Layout
    compute: Compute
    rollout_prompts: int
    lengths: RolloutLengths | None

    @property
    def batches(self) -> AbstractBatches:
        return AbstractBatches(self.config, self.model, self.layout)

    def stage(self, stage: SftStage | GrpoStage) -> PlannedStage:
        """The programs of a stage, and its tokens."""
        prompt, rollouts = self._lengths(stage)
        tokens = stage.settings.prompts * prompt.tokens + float(
            np.mean([x.sum() for x in rollouts])
        )
        programs = self.sft(stage) if isinstance(stage, SftStage) else self.grpo(stage)
        return PlannedStage(stage.name, programs, tokens)

    def sft(self, stage: SftStage) -> PlannedPrograms:
        """Gradients, their sum and the optimizer step of SFT."""
        optimizer = stage.optimizer(self.config)
        state = self._state(stage.settings, optimizer)
        batches = [
            (self.batches.packed(stage, shape), micro)
            for shape, micro in self._micro_batches(stage).items()
        ]
        loss = stage.loss(self.model, self.compute)
        yield from self._update("sft_", loss, optimizer, state, batches, 1, {})

    def grpo(self, stage: GrpoStage) -> PlannedPrograms:
        """Rollout, log-probabilities and update of a GRPO step."""
        config, settings = self.config, stage.settings
        optimizer = stage.optimizer(config)
        state = self._state(settings, optimizer)
        reference = self._reference(settings, state)
        own_reference = {}
        if reference is not None and settings.copies_reference:
            own_reference = {"reference": shard_bytes(reference) - shard_bytes(state.frozen)}
        resting = {} if config.optim.offload else own_reference
        yield from self._rollout(state, self._moments(state) | resting)
        counts = self._micro_batches(stage)
        batches, updates = [], settings.minibatches_per_rollout
        of_step = sum(n * shard_bytes(self.batches.packed(stage, s)) for s, n in counts.items())
        for number, (shape, micro) in enumerate(counts.items(), 1):
            suffix = "" if number == len(counts) else f"_{number}"
            batch = yield from self._with_logprobs(
                stage, state, reference, own_reference, shape, micro, of_step, suffix
            )
            batches.append((batch, micro))
        loss = stage.loss(self.model, self.compute)
        yield from self._update("", loss, optimizer, state, batches, updates, resting)

    def _with_logprobs(
        self,
        stage: GrpoStage,
        state: TrainState[ShapeDtypeStruct],
        reference: Params | None,
        own_reference: Held,
        shape: RowShape,
        micro: float,
        of_step: float,
        suffix: str,
    ) -> Generator[PlannedProgram, Any, GroupBatch[ShapeDtypeStruct]]:
        """A micro-batch of a shape with all that an update needs.

        Args:
          stage, state, reference: the stage.
          own_reference: bytes that the reference takes.
          shape: of its rows.
          micro: of them a step.
          of_step: bytes of all micro-batches of a step.
          suffix: of programs' names.
        """
        settings, batch = stage.settings, self.batches.packed(stage, shape)
        assert isinstance(batch, GroupBatch)
        optimizing = self._moments(state)
        if settings.reuses_vision:
            beside = optimizing | own_reference
            batch = yield from self._with_features(
                settings, state.params, batch, micro, beside, suffix
            )
        waiting = {"other micro-batches": round(max(of_step - shard_bytes(batch), 0))}
        temperature, setting = settings.temperature, "grpo.micro_batch_rows"

        def logprobs(name: str, params: Params, beside: Held, runs: float) -> PlannedProgram:
            args = (self.model, self.compute, temperature, params, batch.rows)
            return PlannedProgram(
                f"{name}{suffix}", logprobs_of, args, runs, beside | waiting, setting
            )

        old = first_update = reference_logprobs = None
        if settings.recomputes_old_logprobs:
            # In the first update they are the current ones.
            later = micro - micro / settings.minibatches_per_rollout
            yield logprobs("old_logprobs", state.params, optimizing | own_reference, later)
            old, first_update = batch.sampled_logprobs, self.batches.scalar(np.bool_)
        if reference is not None:
            beside = optimizing | {"weights": shard_bytes(state.params)}
            found = yield logprobs("reference_logprobs", reference, beside, micro)
            reference_logprobs = found or batch.sampled_logprobs
        return replace(
            batch,
            old_logprobs=old,
            reference_logprobs=reference_logprobs,
            first_update=first_update,
        )

    def _with_features(
        self,
        settings: GrpoSettings,
        params: Params,
        batch: GroupBatch[ShapeDtypeStruct],
        runs: float,
        beside: Held,
        suffix: str,
    ) -> Generator[PlannedProgram, Any, GroupBatch[ShapeDtypeStruct]]:
        """The batch with features of its images in place of pixels."""
        vision = batch.rows.vision
        assert isinstance(vision, VisionInput)  # as made above
        if not vision.frame.shape[1]:
            return batch
        merge = not settings.trains("merger")
        args = (self.model, self.compute, merge, params, vision)
        found = yield PlannedProgram(
            f"vision_features{suffix}", vision_features, args, runs, beside, "grpo.micro_batch_rows"
        )
        if found is None:
            return batch
        features = jax.tree.map(lambda x: self.batches.rows(*x.shape, dtype=x.dtype), found)
        return replace(batch, rows=replace(batch.rows, vision=features))

    def _lengths(self, stage: SftStage | GrpoStage) -> tuple[PromptSize, list[np.ndarray]]:
        """Size of each prompt of a step, and [prompts, G] of responses, of several steps."""
        settings, limit = stage.settings, self.config.rollout.max_new_tokens
        size = settings.prompts, settings.responses_per_prompt
        if self.lengths is None or isinstance(stage, SftStage):
            return PromptSize(*self.config.data.buckets[-1]), [np.full(size, limit)]
        rng, draw = np.random.default_rng(0), self.lengths.responses.draw
        drawn = [np.minimum(draw(rng, *size), limit) for _ in range(_SIMULATED)]
        return self.lengths.prompt, drawn

    def _micro_batches(self, stage: SftStage | GrpoStage) -> dict[RowShape, float]:
        """Micro-batches of a step in each shape, the one that holds the largest groups last.

        They are packed as by one process; several need a few more.

        With the longest prompts and responses all are of that shape; with lengths it is there
        without any, for its memory.
        """
        settings = stage.settings
        shapes = row_shapes(self.config, stage, self.compute.attention)
        prompt, rollouts = self._lengths(stage)
        counts, update = dict.fromkeys(shapes, 0.0), stage.update_prompts
        for lengths in rollouts:
            responses = lengths.sum(axis=1).tolist()
            contents = [
                Content(prompt.tokens + tokens, prompt.patches, tokens) for tokens in responses
            ]
            for first in range(0, settings.prompts, update):
                mine = contents[first : first + update]
                for part in pack_micro_batches(mine, shapes, settings.micro_batch_rows, self.model):
                    counts[part.shape] += 1 / len(rollouts)
        return {s: count for s, count in counts.items() if count or s == shapes[-1]}

    def _rollout(self, state: TrainState[ShapeDtypeStruct], beside: Held) -> PlannedPrograms:
        """Copying the weights, prefill, and decoding with the widest caches."""
        config, model, rollout = self.config, self.model, self.config.rollout
        group, limit = config.grpo.group_size, rollout.max_new_tokens
        setting, size = "rollout.batch_prompts", self.rollout_prompts
        batches = config.grpo.prompts / size
        params = state.params
        args = (model, params, self.compute.dtype)
        weights = yield PlannedProgram(
            "rollout_weights", decode_weights, args, 1, beside, "mesh.fsdp"
        )
        if weights is None:
            return
        layout, before = self.rollout_layout, beside | {"weights": shard_bytes(params)}
        weights = yield from self._resharded(weights, before)
        if weights is None:
            return
        beside = beside | {"rollout copy": shard_bytes(weights)}
        shards = math.lcm(self.layout.batch_shards, layout.batch_shards)
        filled = yield from self._prefilled(
            params, prefill_prompts(size, rollout.prefill_prompts, shards), beside
        )
        if filled is None:
            return
        hidden, prefix = filled
        beside = beside | {"weights": shard_bytes(params)}
        before = beside | {"prompts' caches": shard_bytes(prefix)}
        schedule = self._schedule(max(config.data.prompt_buckets))
        *narrow, widest = [s for s in schedule.shapes if s.samples == size * group]
        width = narrow[-1].slots if narrow else limit
        args = (model.text, group, width, limit, hidden, layout)
        samples = yield PlannedProgram("start", initial_samples, args, batches, before, setting)
        if samples is not None and narrow:
            growths = batches * len(narrow)
            samples = yield from self._grown(samples, width, limit - width, growths, before)
        if samples is None:
            return
        beside = {name: size for name, size in beside.items() if name != "rollout copy"}
        steps = batches * limit if self.lengths is None else 0  # else it shows the memory alone
        yield self._decode("decode", widest, weights, prefix, samples, beside, steps)
        if self.lengths is not None:
            prefix = _with_tokens(prefix, self.lengths.bucket.tokens)
            for shape, steps in self._mean_steps().items():
                name = f"decode_{shape.prompts}x{shape.group}x{shape.slots}"
                args = (weights, _rows_of(prefix, shape), _samples_of(samples, shape))
                yield self._decode(name, shape, *args, beside, steps)

    def _prefilled(
        self, params: Params, prompts: int, beside: Held
    ) -> Generator[PlannedProgram, Any, tuple[Any, Prefix[ShapeDtypeStruct]] | None]:
        """Prefill of some prompts at a time, and what all of a rollout batch give."""
        batch, setting = self.batches.prompts(prompts), "rollout.prefill_prompts"
        parts = self.rollout_prompts // prompts
        longest = max(self.config.data.prompt_buckets)
        columns = {"prompts' caches": (self.rollout_prompts - prompts) * longest}
        if left := self._schedule(longest).leftovers:  # of the batches before
            columns["leftovers"] = left.columns(longest)
        others = {
            name: cache_bytes(self.config, self.model, self.rollout_layout, count)
            for name, count in columns.items()
        }
        program = prefill_program(self.model, self.compute, self.rollout_layout)
        runs, beside = self.config.grpo.prompts / prompts, beside | others
        counted = runs if self.lengths is None else 0  # else it shows the memory alone
        found = yield PlannedProgram("prefill", program, (params, batch), counted, beside, setting)
        if self.lengths is not None:
            batch = self.batches.prompts(prompts, self.lengths.bucket)
            name = f"prefill_{self.lengths.bucket.tokens}"
            yield PlannedProgram(name, program, (params, batch), runs, beside, setting)
        if found is None:
            return None
        return jax.tree.map(lambda x: x.update(shape=(parts * x.shape[0], *x.shape[1:])), found)

    def _decode(
        self,
        name: str,
        shape: DecodeShape,
        weights: DecodeWeights,
        prefix: Prefix[ShapeDtypeStruct],
        samples: DecodeState[ShapeDtypeStruct],
        beside: Held,
        steps: float,
    ) -> PlannedProgram:
        """The decode program of a shape, with the steps that it does in a GRPO step."""
        rollout, model = self.config.rollout, self.model
        settings = DecodeSettings(
            Sampling(self.config.grpo.temperature),
            (model.eos_token_id,),
            model.vision_tokens,
            rollout.check_every,
            self.rollout_layout,
        )
        keys = self.batches.keys(shape.prompts, shape.group)
        args = (model, settings, shape.slots, weights, prefix, samples, keys)
        trip_count = shape.slots / rollout.check_every
        runs, setting = steps / shape.slots, "rollout.batch_prompts"
        return PlannedProgram(name, decode_chunk, args, runs, beside, setting, trip_count)

    def _schedule(self, prompt_tokens: int) -> Schedule:
        grpo, rollout = self.config.grpo, self.config.rollout
        hosts = {device.process_index for device in self.layout.mesh.devices.flat}
        return Schedule.of(
            self.rollout_prompts,
            grpo.group_size,
            rollout.max_new_tokens,
            kv_block=rollout.kv_block,
            check_every=rollout.check_every,
            prompt_tokens=prompt_tokens,
            shards=self.rollout_layout.batch_shards,
            batches=grpo.prompts // self.rollout_prompts if len(hosts) == 1 else 1,
        )

    def _mean_steps(self) -> dict[DecodeShape, float]:
        """Steps of a rollout in each shape, on average over simulated ones."""
        assert self.lengths is not None
        schedule = self._schedule(self.lengths.bucket.tokens)
        grpo, limit = self.config.grpo, self.config.rollout.max_new_tokens
        rng, steps = np.random.default_rng(0), dict.fromkeys(schedule.shapes, 0.0)
        for _ in range(_SIMULATED):
            drawn = self.lengths.responses.draw(rng, grpo.prompts, grpo.group_size)
            batches = np.split(np.minimum(drawn, limit), grpo.prompts // self.rollout_prompts)
            for span in schedule.simulate(*batches):
                steps[span.shape] += span.steps / _SIMULATED
        return {shape: mean for shape, mean in steps.items() if mean}

    def _resharded(
        self, weights: DecodeWeights, beside: Held
    ) -> Generator[PlannedProgram, Any, DecodeWeights | None]:
        """Resharding the weights for sampling: what is around the layers, then each layer."""
        model, layout = self.model, self.rollout_layout
        *_, layer = layers = weights["layers"]
        around = {name: part for name, part in weights.items() if name != "layers"}
        before = beside | {"layers": shard_bytes(layers)}
        program = reshard_program(model, layout, of_layer=False)
        moved = yield PlannedProgram("rollout_reshard", program, (around,), 1, before, "mesh.fsdp")
        if moved is None:
            return None
        copy = jax.tree.map(
            lambda x, sharding: ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            layer,
            decode_weight_shardings(model, layout)["layers"],
        )
        others = shard_bytes(moved) + (len(layers) - 1) * shard_bytes(copy)
        before = beside | {"rollout copy": others}
        name, runs = "rollout_reshard_layer", len(layers)
        program = reshard_program(model, layout, of_layer=True)
        layer = yield PlannedProgram(name, program, (layer,), runs, before, "mesh.fsdp")
        return None if layer is None else moved | {"layers": [layer] * len(layers)}

    def _grown(
        self, samples: DecodeState, width: int, slots: int, growths: float, beside: Held
    ) -> Generator[PlannedProgram, Any, DecodeState | None]:
        """Growing the last layer's cache from `width` by `slots`, beside all the others."""
        layers = len(samples.layers)
        others = shard_bytes(samples.layers[1:]) * (width + slots) // width
        beside = beside | {"samples' caches": others}
        args, runs = (samples.layers[0], slots, self.rollout_layout), growths * layers
        grown = yield PlannedProgram(
            "grow", grow_layer, args, runs, beside, "rollout.batch_prompts"
        )
        return None if grown is None else replace(samples, layers=(grown,) * layers)

    def _moments(self, state: TrainState[ShapeDtypeStruct]) -> Held:
        """The optimizer's state on the device outside its step."""
        return {} if self.config.optim.offload else {"optimizer": shard_bytes(state.opt_state)}

    def _update(
        self,
        prefix: str,
        loss: SftLoss | GrpoLoss,
        optimizer: optax.GradientTransformation,
        state: TrainState[ShapeDtypeStruct],
        batches: Sequence[tuple[PackedBatch[ShapeDtypeStruct], float]],
        updates: int,
        beside: Held,
    ) -> PlannedPrograms:
        """One or several optimizer steps over micro-batches, each with how many a step has."""
        trained, micro = state.trained, round(sum(count for _, count in batches), 9)  # a mean
        several = micro > updates
        waiting = sum(count * shard_bytes(batch) for batch, count in batches)
        largest = max(shard_bytes(batch) for batch, _ in batches)
        if isinstance(loss, GrpoLoss):  # those of SFT are made one after another
            beside = beside | {"other micro-batches": round(max(waiting - largest, 0))}
        optimizing = beside | self._moments(state)
        shardings = gradient_shardings(trained)
        shapes = jax.tree.leaves(trained)
        if shardings:
            shapes = [x.update(sharding=s) for x, s in zip(shapes, shardings, strict=True)]
        summed = {"gradients so far": shard_bytes(shapes)} if several else {}
        section, gradients = "grpo" if isinstance(loss, GrpoLoss) else "sft", None
        for number, (batch, count) in enumerate(batches, 1):
            suffix = "" if number == len(batches) else f"_{number}"
            args = (loss, trained, state.frozen, batch, shardings)
            found = yield PlannedProgram(
                f"{prefix}gradients{suffix}",
                micro_gradients,
                args,
                count,
                optimizing | summed,
                f"{section}.micro_batch_rows",
            )
            gradients = gradients if found is None else found[0]
        if gradients is None:
            return
        weights = {"weights": shard_bytes(trained) + shard_bytes(state.frozen)}
        micro_batch = {"micro-batch": largest}
        if several:
            args = (gradients, gradients)
            beside_sum = optimizing | weights | micro_batch
            runs = micro - updates
            yield PlannedProgram(f"{prefix}add", add_gradients, args, runs, beside_sum, "mesh.fsdp")
        held = beside | micro_batch | {"frozen weights": shard_bytes(state.frozen)}
        args = (optimizer, replace(state, frozen={}), gradients, param_shardings(trained))
        yield PlannedProgram(f"{prefix}apply", apply_gradients, args, updates, held, "mesh.fsdp")

    def _state(
        self, settings: StageSettings, optimizer: optax.GradientTransformation
    ) -> TrainState[ShapeDtypeStruct]:
        return abstract_stage_state(self.config, self.model, self.layout, settings, optimizer)

    def _reference(
        self, settings: GrpoSettings, state: TrainState[ShapeDtypeStruct]
    ) -> Params | None:
        if not settings.kl_coef:
            return None
        if not settings.copies_reference:
            return drop_adapters(state.frozen)
        dtype = jnp.dtype(self.config.model.dtype)
        return merge_params(
            jax.tree.map(lambda x: x.update(dtype=dtype), state.trained), state.frozen
        )


def _with_tokens(prefix: Prefix[ShapeDtypeStruct], tokens: int) -> Prefix[ShapeDtypeStruct]:
    """The prompts' caches with as many tokens each."""
    layers = jax.tree.map(
        lambda x: x.update(shape=(*x.shape[:2], tokens, x.shape[3])), prefix.layers
    )
    valid = prefix.valid.update(shape=(prefix.valid.shape[0], tokens))
    return replace(prefix, layers=layers, valid=valid)


def _rows_of(prefix: Prefix[ShapeDtypeStruct], shape: DecodeShape) -> Prefix[ShapeDtypeStruct]:
    """The prompts of a shape."""
    return jax.tree.map(lambda x: x.update(shape=(shape.prompts, *x.shape[1:])), prefix)


def _samples_of(
    samples: DecodeState[ShapeDtypeStruct], shape: DecodeShape
) -> DecodeState[ShapeDtypeStruct]:
    """The samples of a shape."""
    rows = (shape.prompts, shape.group)
    small = jax.tree.map(lambda x: x.update(shape=(*rows, *x.shape[2:])) if x.ndim else x, samples)
    layers = jax.tree.map(
        lambda x: x.update(shape=(*rows, x.shape[2], shape.slots, x.shape[4])), samples.layers
    )
    return replace(small, layers=layers)

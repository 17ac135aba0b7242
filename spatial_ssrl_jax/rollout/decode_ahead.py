"""The programs of a rollout's later sizes, compiled in a thread before its samples come there.

Those of leftovers alone are compiled when they are called.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jax import Array, ShapeDtypeStruct

from spatial_ssrl_jax.parallel.compile_ahead import CompileAhead, abstract, compile_abstract
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.rollout.cache import DecodeState, Prefix
from spatial_ssrl_jax.rollout.decode import (
    DecodeSettings,
    DecodeWeights,
    decode_chunk,
    grow_layer,
    select_prompts,
    select_samples,
)
from spatial_ssrl_jax.rollout.schedule import DecodeShape, Schedule, select_rows


@dataclass(frozen=True)
class DecodeAhead:
    """Compiles what a rollout calls after its first size.

    Attributes:
      queue: does it; nothing else is queued there.
      config: the model's shape.
      settings: of the decode programs.
      schedule: the rollout's sizes.
    """

    queue: CompileAhead
    config: QwenVLConfig
    settings: DecodeSettings
    schedule: Schedule

    def expect(
        self,
        weights: DecodeWeights,
        state: DecodeState[Array],
        prefix: Prefix[Array],
        keys_BG: Array,
    ) -> None:
        """Queues the programs of all sizes but the first, in place of other rollouts' that wait.

        Args:
          weights: of the decode programs.
          state, prefix, keys_BG: of the rollout's first size.
        """
        if not self.queue.enabled:
            return
        self.queue.drop()
        first, *later = self.schedule.shapes
        found = {first: _Rows(first, *abstract((state, prefix, keys_BG)))}
        job = partial(self._compile, abstract(weights), found)
        for shape in later:
            self.queue.add(self._key(shape), partial(job, shape))

    def claim(self, shape: DecodeShape) -> None:
        """Call it before samples come to a size: see `CompileAhead.claim`."""
        self.queue.claim(self._key(shape))

    def _key(self, shape: DecodeShape) -> tuple[DecodeSettings, Schedule, DecodeShape]:
        return self.settings, self.schedule, shape

    def _compile(
        self, weights: DecodeWeights, found: dict[DecodeShape, "_Rows"], shape: DecodeShape
    ) -> None:
        rows = self._rows(found, shape)
        args = (self.schedule.steps_between, weights, rows.prefix, rows.state, rows.keys)
        compile_abstract(decode_chunk, self.config, self.settings, *args)

    def _rows(self, found: dict[DecodeShape, "_Rows"], shape: DecodeShape) -> "_Rows":
        """What there is in a size, from the size before it; `found` has the first."""
        if shape not in found:
            before = self._rows(found, self.schedule.before(shape))
            found[shape] = before.resized(shape, self.settings)
        return found[shape]


@dataclass(frozen=True)
class _Rows:
    """The arguments of a decode program that have its size, without their numbers."""

    shape: DecodeShape
    state: DecodeState[ShapeDtypeStruct]
    prefix: Prefix[ShapeDtypeStruct]
    keys: ShapeDtypeStruct

    def resized(self, shape: DecodeShape, settings: DecodeSettings) -> "_Rows":
        """Those of another size; compiles the programs of `select` and `grow` that make them."""
        layout, (layer, *_) = settings.layout, self.state.layers
        state, prefix, keys = self.state, self.prefix, self.keys
        if not shape.has_rows_of(self.shape):
            finished = np.zeros((self.shape.prompts, self.shape.group), bool)
            rows = select_rows(finished, shape)
            samples = (rows.prompt, rows.sample, layout)
            small = (replace(state, layers=()), keys)
            state, keys = compile_abstract(select_samples, small, *samples)
            layer = compile_abstract(select_samples, layer, *samples)
            if not rows.keeps(self.shape.prompts):
                of_prompt = partial(compile_abstract, select_prompts)
                shared = of_prompt(prefix.layers[0], rows.prompt, layout)
                rest = of_prompt((prefix.valid, prefix.next_position), rows.prompt, layout)
                prefix = Prefix((shared,) * len(prefix.layers), *rest)
        if shape.slots > self.shape.slots:
            layer = compile_abstract(grow_layer, layer, shape.slots - self.shape.slots, layout)
        state = replace(state, layers=(layer,) * len(self.state.layers))
        return _Rows(shape, state, prefix, keys)

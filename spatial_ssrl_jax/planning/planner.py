"""Compiles every program of a run for devices that need not be there, and says what it would cost.

Memory is the compiler's own account of each program, with what else is on the device then. FLOPs
are counted in the traced program, bytes in the compiled one, loops multiplied in; from them follows
the least time that the chip's peaks allow. All is at the largest buckets, with every response at
`rollout.max_new_tokens`: real steps are shorter.
"""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import jax

from spatial_ssrl_jax.checkpoint.models import read_shape
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.perf.device_specs import DeviceSpec
from spatial_ssrl_jax.perf.flops import jaxpr_flops
from spatial_ssrl_jax.planning import hlo
from spatial_ssrl_jax.planning.gpus import GPUS
from spatial_ssrl_jax.planning.programs import (
    PlannedProgram,
    PlannedStage,
    planned_stages,
    shard_bytes,
)
from spatial_ssrl_jax.planning.topology import Topology, open_topology
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.rl.placement import check_sharding

_GIB = 2**30

_NAMED = 4  # buffers that are named of a program

_NEEDS = re.compile(r"[Uu]sed ([\d.]+)([KMG]) of|temporaries \(([\d.]+)([KMG])\)")

_LISTED = re.compile(r"Size: ([\d.]+)([KMG])\s.*?Shape: (\w+\[[\d,]*\])", re.DOTALL)

_UNITS = {"K": 2**10, "M": 2**20, "G": _GIB}


@dataclass(frozen=True)
class Buffer:
    """A large array: where it comes from, and its bytes on one device."""

    name: str
    bytes: float


@dataclass
class ProgramCost:
    """What one run of a program takes of one device.

    Attributes:
      name, runs: of the program, and how often a step calls it.
      argument_bytes, temp_bytes, output_bytes: as the compiler says; results that are in donated
        arguments are not among the output.
      beside: bytes that are taken besides, by what takes them.
      flops: of matmuls.
      bytes_accessed, collective_bytes: moved in the main memory, and sent to other devices of the
        slice.
      far_bytes: sent to other slices, over the data-centre network.
      compile_seconds: how long compiling took here.
      largest_buffers: of arguments and of temporaries.
      setting: what to lower where it does not fit.
      estimated_seconds, bound: the least time, and what it is spent with; None where the peaks are
        not known.
      fits: whether `peak_bytes` is within the device's memory.
    """

    name: str
    runs: float
    beside: dict[str, int]
    setting: str
    argument_bytes: float = 0.0
    temp_bytes: float = 0.0
    output_bytes: float = 0.0
    flops: float = 0.0
    bytes_accessed: float = 0.0
    collective_bytes: float = 0.0
    far_bytes: float = 0.0
    compile_seconds: float = 0.0
    largest_buffers: list[Buffer] = field(default_factory=list)
    estimated_seconds: float | None = None
    bound: str | None = None
    fits: bool = True

    @property
    def peak_bytes(self) -> float:
        """All that is on the device while the program runs."""
        own = self.argument_bytes + self.temp_bytes + self.output_bytes
        return own + sum(self.beside.values())


def _without_gpu(config: Config) -> Config:
    """The run without what must ask the GPU.

    cuDNN makes its programs there; how often the Triton kernel's loops turn is in no text, and JAX
    0.11 wants a GPU to lower it.
    """
    for name, refused in (("model", "cudnn"), ("rollout", "triton")):
        if getattr(config, name).attention == refused:
            raise UserError(
                f"{name}.attention={refused} cannot be planned without the GPU: leave it out, and "
                "the plan is of xla."
            )
    return replace(config, rollout=replace(config.rollout, attention="xla"))


def plan(config: Config, topology_name: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Compiles the programs of the config's stages.

    Args:
      config: the run; on a GPU that is not there, all attention is by `xla`.
      topology_name: as `open_topology` takes it.
      say: told what is being compiled, for that takes minutes.

    Returns:
      Plain JSON types; `step` is that of GRPO, or of the cold start where there is no GRPO.

    Raises:
      UserError: no such topology, no model there, sizes that do not go with one another, or
        attention that needs the GPU.
    """
    if topology_name in GPUS:
        config = _without_gpu(config)
    topology = open_topology(topology_name)
    model = read_shape(config.model.path)
    layout = Layout(make_mesh(config.mesh, topology.devices))
    planned = planned_stages(config, model, layout, check_sharding(config, model, layout))
    found = {stage.name: list(program_costs(stage, model, topology, say)) for stage in planned}
    programs, last = [cost for part in found.values() for cost in part], planned[-1]
    return {
        "topology": topology.name,
        "devices": len(topology.devices),
        "hbm_bytes": topology.peak.memory if topology.peak else None,
        "fits": all(cost.fits for cost in programs),
        "programs": [asdict(cost) | {"peak_bytes": cost.peak_bytes} for cost in programs],
        "step": _step(found[last.name], last.tokens, len(topology.devices)),
    }


def _step(programs: list[ProgramCost], tokens: int, devices: int) -> dict[str, float | None]:
    """The stage's whole step, from how often each of its programs runs."""
    seconds = [cost.estimated_seconds for cost in programs]
    if None in seconds:
        return {"estimated_seconds": None, "tokens_per_second_per_chip": None}
    whole = sum(cost.runs * second for cost, second in zip(programs, seconds, strict=True))
    return {
        "estimated_seconds": whole,
        "tokens_per_second_per_chip": tokens / whole / devices,
    }


def program_costs(
    stage: PlannedStage, model: QwenVLConfig, topology: Topology, say: Callable[[str], None]
) -> Iterator[ProgramCost]:
    """Compiles a stage's programs, one after another."""
    programs, result = stage.programs, None
    full = model.vision.full_attention_blocks / model.vision.depth
    while True:
        try:
            program = programs.send(result)
        except StopIteration:
            return
        say(f"compiling {program.name}")
        cost, result = _compiled(program, full, topology)
        yield cost


def _compiled(program: PlannedProgram, full: float, topology: Topology) -> tuple[ProgramCost, Any]:
    """What a program costs, and the shapes of its results; those are None where it does not fit."""
    cost = ProgramCost(program.name, program.runs, dict(program.beside), program.setting)
    traced = program.function.trace(*program.args)
    devices = len(topology.devices)
    cost.flops = jaxpr_flops(traced.jaxpr.jaxpr, program.turns, full) / devices
    cost.largest_buffers = _largest_arguments(program.args)
    begun, lowered = time.perf_counter(), traced.lower()
    try:
        compiled = lowered.compile(compiler_options=topology.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        cost.compile_seconds = time.perf_counter() - begun
        _refused(cost, program, str(error))
        return cost, None
    cost.compile_seconds = time.perf_counter() - begun
    memory, text = compiled.memory_analysis(), compiled.as_text()
    given = shard_bytes(_arrays(program.args))
    # What a program does not use is no argument of it, but stays where it is.
    cost.argument_bytes = max(given, memory.argument_size_in_bytes)
    cost.temp_bytes = memory.temp_size_in_bytes
    cost.output_bytes = memory.output_size_in_bytes - memory.alias_size_in_bytes
    moved = hlo.HloModule(text, topology.slice_size, topology.slices).moved(program.turns, full)
    cost.bytes_accessed, cost.collective_bytes = moved.memory, moved.network
    cost.far_bytes = moved.far
    cost.largest_buffers += [Buffer(name, size) for size, name in hlo.largest_arrays(text, _NAMED)]
    if topology.peak is not None:
        _estimate(cost, topology.peak)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        lowered.out_info,
        compiled.output_shardings,
    )
    return cost, shapes


def _estimate(cost: ProgramCost, peak: DeviceSpec) -> None:
    """The least time that the peaks allow, and whether the program fits."""
    seconds = {
        "compute": cost.flops / peak.flops,
        "memory": cost.bytes_accessed / peak.bandwidth,
        "network": cost.collective_bytes / peak.network if peak.network else 0.0,
        "far": cost.far_bytes / peak.far if peak.far else 0.0,
    }
    longest = max(seconds, key=seconds.get)
    cost.bound = "network" if longest == "far" else longest
    cost.estimated_seconds = seconds[longest]
    cost.fits = peak.memory is None or cost.peak_bytes <= peak.memory


def _refused(cost: ProgramCost, program: PlannedProgram, error: str) -> None:
    """Fills in what the compiler says of a program that does not fit even alone."""
    cost.argument_bytes = shard_bytes(_arrays(program.args))
    if found := _NEEDS.search(error):
        size, unit = found[1] or found[3], found[2] or found[4]
        needs = float(size) * _UNITS[unit]
        cost.temp_bytes = needs - cost.argument_bytes if found[1] else needs
    cost.largest_buffers += [
        Buffer(shape, float(size) * _UNITS[unit]) for size, unit, shape in _LISTED.findall(error)
    ][:_NAMED]
    cost.fits = False


def _arrays(args: tuple) -> list[jax.ShapeDtypeStruct]:
    return [x for x in jax.tree.leaves(args) if isinstance(x, jax.ShapeDtypeStruct)]


def _largest_arguments(args: tuple) -> list[Buffer]:
    """The largest arguments by their paths; layers of a cache or of weights count as one."""
    sizes: dict[str, float] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(args):
        if isinstance(x, jax.ShapeDtypeStruct):
            name = re.sub(r"\[\d+\]", "[*]", jax.tree_util.keystr(path[1:]))
            sizes[name] = sizes.get(name, 0) + shard_bytes(x)
    order = sorted(sizes, key=sizes.get, reverse=True)
    return [Buffer(name, sizes[name]) for name in order[:_NAMED]]

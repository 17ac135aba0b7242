"""Compiles every program of a run ahead of time and estimates its memory and its time.

Memory is the compiler's own account of each program, plus what else is on the device meanwhile.
FLOPs are counted in the traced program, bytes in the compiled one, with loops' trip counts
multiplied in; from them and the chip's peak rates follows the minimum time. All is at the largest
buckets, with every response at `rollout.max_new_tokens`, decoded in the widest caches: real steps
are shorter, and `lengths` say by how much, but for prefill.
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
from spatial_ssrl_jax.parallel.sharding import Layout, shard_bytes
from spatial_ssrl_jax.perf.device_specs import DeviceSpec
from spatial_ssrl_jax.perf.flops import jaxpr_flops
from spatial_ssrl_jax.planning.gpus import GPUS
from spatial_ssrl_jax.planning.hlo_traffic import largest_arrays, program_traffic
from spatial_ssrl_jax.planning.programs import (
    PlannedProgram,
    PlannedStage,
    RolloutLengths,
    planned_stages,
)
from spatial_ssrl_jax.planning.topology import Topology, open_topology
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.rl.placement import check_sharding

_BUFFERS = 4  # largest ones that a program's cost lists

# Parts of the compiler's error for a program that does not fit.
_NEEDS = re.compile(r"[Uu]sed ([\d.]+)([KMG]) of|temporaries \(([\d.]+)([KMG])\)")
_LISTED = re.compile(r"Size: ([\d.]+)([KMG])\s.*?Shape: (\w+\[[\d,]*\])", re.DOTALL)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Buffer:
    """A large array: where it comes from, and its bytes on one device."""

    name: str
    bytes: float


@dataclass
class ProgramCost:
    """Cost of one run of a program on one device.

    Attributes:
      name: of the program.
      runs: how often a step calls it.
      beside: bytes of what else is on the device, by what takes them.
      setting: what to lower if it does not fit.
      argument_bytes, temp_bytes, output_bytes: from the compiler; results in donated arguments do
        not count as output.
      flops: of matmuls.
      bytes_accessed: read from and written to the main memory.
      collective_bytes: sent to other devices of the slice.
      far_bytes: sent to other slices, over the data-centre network.
      compile_seconds: wall time of compiling it here.
      largest_buffers: of arguments and of temporaries.
      estimated_seconds: minimum time; None where the peak rates are not known.
      bound: `compute`, `memory` or `network`: which rate bounds it; None likewise.
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
        """Bytes in use on the device while the program runs."""
        own = self.argument_bytes + self.temp_bytes + self.output_bytes
        return own + sum(self.beside.values())


@dataclass(frozen=True)
class StepEstimate:
    """The least time of a step, from how often it runs each program; None where unknown.

    Attributes:
      estimated_seconds: of the whole step: with the longest prompts and responses, or with given
        lengths, but that prefill has the longest prompts.
      tokens_per_second_per_chip: of those.
      decode_seconds: of its decode programs.
    """

    estimated_seconds: float | None = None
    tokens_per_second_per_chip: float | None = None
    decode_seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """The programs of a run on a topology.

    Attributes:
      topology: its name.
      devices: how many it has.
      hbm_bytes: memory of a device; None where it is not known.
      programs: of all stages, in the order of a step.
      step: of GRPO, or of SFT without GRPO.
    """

    topology: str
    devices: int
    hbm_bytes: int | None
    programs: list[ProgramCost]
    step: StepEstimate

    @property
    def fits(self) -> bool:
        """Whether every program fits."""
        return all(cost.fits for cost in self.programs)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types: the fields, `fits`, and `peak_bytes` of each program."""
        programs = [asdict(cost) | {"peak_bytes": cost.peak_bytes} for cost in self.programs]
        return asdict(self) | {"fits": self.fits, "programs": programs}


def _without_gpu(config: Config) -> Config:
    """The run with XLA's attention in place of kernels that need the GPU to compile.

    cuDNN makes its programs there; the trip counts of the Triton kernel's loops are in no text, and
    JAX 0.11 needs a GPU to lower it.
    """
    for name, refused in (("model", "cudnn"), ("rollout", "triton")):
        if getattr(config, name).attention == refused:
            raise UserError(
                f"{name}.attention={refused} cannot be planned without the GPU: leave it out, and "
                "the plan is of xla."
            )
    return replace(config, rollout=replace(config.rollout, attention="xla"))


def plan(
    config: Config,
    topology_name: str,
    report: Callable[[str], None],
    lengths: RolloutLengths | None = None,
) -> Plan:
    """Compiles the programs of the config's stages.

    Args:
      config: the run; for a GPU of `GPUS`, `auto` attention is XLA's.
      topology_name: as `open_topology` takes it.
      report: called with each program that is being compiled, which takes minutes.
      lengths: of a GRPO step's prompts and responses, for its time; None is the longest of all.

    Raises:
      UserError: an unknown topology, no model at its path, sizes that do not fit together, or
        attention that needs the GPU.
    """
    if topology_name in GPUS:
        config = _without_gpu(config)
    topology = open_topology(topology_name)
    model = read_shape(config.model.path)
    layout = Layout(make_mesh(config.mesh, topology.devices))
    memory = topology.spec.memory if topology.spec else None
    rollout_layout = check_sharding(config, model, layout)
    planned = planned_stages(config, model, layout, rollout_layout, memory, lengths)
    found = {stage.name: list(program_costs(stage, model, topology, report)) for stage in planned}
    programs, last = [cost for part in found.values() for cost in part], planned[-1]
    return Plan(
        topology=topology.name,
        devices=len(topology.devices),
        hbm_bytes=memory,
        programs=programs,
        step=_step(found[last.name], last.tokens, len(topology.devices)),
    )


def _step(programs: list[ProgramCost], tokens: float, devices: int) -> StepEstimate:
    """The estimate from a stage's programs."""
    if any(cost.estimated_seconds is None for cost in programs):
        return StepEstimate()
    times = {cost.name: cost.runs * (cost.estimated_seconds or 0) for cost in programs}
    decode = sum(time for name, time in times.items() if name.startswith("decode")) or None
    whole = sum(times.values())
    return StepEstimate(whole, tokens / whole / devices, decode)


def program_costs(
    stage: PlannedStage, model: QwenVLConfig, topology: Topology, report: Callable[[str], None]
) -> Iterator[ProgramCost]:
    """Compiles a stage's programs, one after another."""
    programs, result = stage.programs, None
    full = model.vision.full_attention_blocks / model.vision.depth
    while True:
        try:
            program = programs.send(result)
        except StopIteration:
            return
        report(f"compiling {program.name}")
        cost, result = _compiled(program, full, topology)
        yield cost


def _compiled(program: PlannedProgram, full: float, topology: Topology) -> tuple[ProgramCost, Any]:
    """A program's cost, and the shapes of its results; None if it does not even fit alone.

    Args:
      program: to compile.
      full: fraction of the vision tower's blocks that attend to whole images: the expensive branch.
      topology: to compile for.
    """
    cost = ProgramCost(program.name, program.runs, dict(program.beside), program.setting)
    traced = program.function.trace(*program.args)
    devices = len(topology.devices)
    cost.flops = jaxpr_flops(traced.jaxpr.jaxpr, program.trip_count, full) / devices
    cost.largest_buffers = _largest_arguments(program.args)
    start, lowered = time.perf_counter(), traced.lower()
    try:
        compiled = lowered.compile(compiler_options=topology.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        cost.compile_seconds = time.perf_counter() - start
        _read_refusal(cost, program, str(error))
        return cost, None
    cost.compile_seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        raise UserError(f"the compiler for {topology.name} does not report a program's memory.")
    given = shard_bytes(_arrays(program.args))
    # Arrays that a program does not use are no arguments of it, but stay on the device.
    cost.argument_bytes = max(given, memory.argument_size_in_bytes)
    cost.temp_bytes = memory.temp_size_in_bytes
    cost.output_bytes = memory.output_size_in_bytes - memory.alias_size_in_bytes
    traffic = program_traffic(text, topology.slice_size, topology.slices, program.trip_count, full)
    cost.bytes_accessed, cost.collective_bytes = traffic.memory, traffic.network
    cost.far_bytes = traffic.dcn
    cost.largest_buffers += [Buffer(name, size) for size, name in largest_arrays(text, _BUFFERS)]
    if topology.spec is not None:
        _estimate(cost, topology.spec)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        lowered.out_info,
        compiled.output_shardings,
    )
    return cost, shapes


def _estimate(cost: ProgramCost, spec: DeviceSpec) -> None:
    """Sets the minimum time that the peak rates allow, and whether the program fits."""
    seconds, cost.bound = max(
        (cost.flops / spec.flops, "compute"),
        (cost.bytes_accessed / spec.bandwidth, "memory"),
        (cost.collective_bytes / spec.network if spec.network else 0.0, "network"),
        (cost.far_bytes / spec.dcn if spec.dcn else 0.0, "network"),
        key=lambda bound: bound[0],
    )
    cost.estimated_seconds = seconds
    cost.fits = spec.memory is None or cost.peak_bytes <= spec.memory


def _read_refusal(cost: ProgramCost, program: PlannedProgram, error: str) -> None:
    """Sets the sizes from the compiler's error for a program that does not even fit alone."""
    cost.argument_bytes = shard_bytes(_arrays(program.args))
    if found := _NEEDS.search(error):
        size, unit = found[1] or found[3], found[2] or found[4]
        needs = float(size) * _UNITS[unit]
        cost.temp_bytes = needs - cost.argument_bytes if found[1] else needs
    cost.largest_buffers += [
        Buffer(shape, float(size) * _UNITS[unit]) for size, unit, shape in _LISTED.findall(error)
    ][:_BUFFERS]
    cost.fits = False


def _arrays(args: tuple[Any, ...]) -> list[jax.ShapeDtypeStruct]:
    return [x for x in jax.tree.leaves(args) if isinstance(x, jax.ShapeDtypeStruct)]


def _largest_arguments(args: tuple[Any, ...]) -> list[Buffer]:
    """The largest arguments by their paths; all layers of a cache or of weights count as one."""
    sizes: dict[str, float] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(args):
        if isinstance(x, jax.ShapeDtypeStruct):
            name = re.sub(r"\[\d+\]", "[*]", jax.tree_util.keystr(path[1:]))
            sizes[name] = sizes.get(name, 0) + shard_bytes(x)
    order = sorted(sizes.items(), key=lambda item: item[1], reverse=True)
    return [Buffer(name, size) for name, size in order[:_BUFFERS]]

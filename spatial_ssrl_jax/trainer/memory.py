"""Memory: advice when a device runs out of it, and reuse of freed memory on CPU."""

import ctypes
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from importlib.util import find_spec

import jax

from spatial_ssrl_jax.common.errors import UserError, disk_problem
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.rl.stages import stages

# Parameters of glibc's mallopt(3), from its <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """On CPU, keeps freed memory in the process for the next program.

    XLA takes each program's large arrays from `malloc`, and glibc returns them to the system when
    they are freed; to fault them in and zero them again at every step takes 10 to 20 % of an
    update. The process keeps its peak memory until it ends. Call it before JAX looks for devices,
    whose threads would have their own arenas. It does nothing where there is an accelerator or
    another C library.
    """
    if _only_cpu() and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_ARENA_MAX, 1)


def _only_cpu() -> bool:
    """Whether JAX will find no accelerator; does not initialise its backends."""
    platforms = getattr(jax.config, "jax_platforms", None)
    if platforms:
        return platforms == "cpu"
    return not find_spec("libtpu") and not entry_points(group="jax_plugins")


@contextmanager
def explain_out_of_memory(advice: Sequence[str]) -> Iterator[None]:
    """Turns a device's out-of-memory error, while compiling or running, into a `UserError`.

    Args:
      advice: changes to try, in this order.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or disk_problem(error):
            raise
        wanted = re.search(
            r"allocat\w+ (?:request for )?([\d.,]+ ?(?:[KMGT]i?B|bytes))", str(error)
        )
        request = f" (request for {wanted[1]} more)" if wanted else ""
        raise UserError(
            f"the device {jax.devices()[0].device_kind} ran out of memory{request}: "
            f"{'; or '.join(advice)}."
        ) from error


def memory_advice(config: Config) -> list[str]:
    """The settings that would reduce a run's memory, without those already in use."""
    grpo, sft, advice = config.grpo, config.sft, []
    for name, steps, micro in (
        ("grpo.micro_batch_rows", grpo.steps, grpo.micro_batch_rows),
        ("sft.micro_batch_rows", sft.steps, sft.micro_batch_rows),
    ):
        if steps and micro > 1:
            advice.append(f"lower {name}={micro}")
    if grpo.steps and config.rollout.batch_prompts != 1:
        if config.rollout.prefill_prompts > 1:
            advice.append(f"lower rollout.prefill_prompts={config.rollout.prefill_prompts}")
        shown = f"={config.rollout.batch_prompts}" if config.rollout.batch_prompts else ""
        advice.append(f"lower rollout.batch_prompts{shown}")
    if config.eval.batch_prompts > 1:
        advice.append(f"lower eval.batch_prompts={config.eval.batch_prompts}")
    if config.model.remat != "full":
        advice.append(f"set model.remat=full instead of {config.model.remat}")
    if config.model.dtype == "float32":
        advice.append("set model.dtype=bfloat16")
    for stage in stages(config):
        if not stage.settings.lora.rank:
            advice.append(f"train only adapters ({stage.name}.lora.rank=64)")
    if not config.optim.offload:
        advice.append("keep optimizer moments and reference in host memory (optim.offload=True)")
    advice.append("shard the weights over more devices (mesh.fsdp)")
    return advice

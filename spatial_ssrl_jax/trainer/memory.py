"""Memory: running out of it, said in a sentence that names what helps, and keeping it on CPU."""

import ctypes
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from importlib.util import find_spec

import jax

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config

# Parameters of glibc's mallopt(3), from its <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """On CPU, lets the process keep what programs free, for the next program.

    XLA takes each program's large arrays from `malloc`, and glibc hands them back to the system as
    soon as they are freed; faulting them in and zeroing them again at every step is a tenth to a
    fifth of an update. The process then holds its highest use to its end. To be called before JAX
    looks for devices, whose threads would have their own arenas; does nothing where accelerators
    can be used, and with other C libraries.
    """
    if _cpu_alone() and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_ARENA_MAX, 1)


def _cpu_alone() -> bool:
    """Whether JAX will find no accelerator, told without making it look."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    return not find_spec("libtpu") and not entry_points(group="jax_plugins")


@contextmanager
def explain_out_of_memory(advice: Sequence[str]) -> Iterator[None]:
    """Turns a device's lack of memory, while compiling or running, into a `UserError`.

    Args:
      advice: what to change, in the order to try it.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        wanted = re.search(
            r"allocat\w+ (?:request for )?([\d.,]+ ?(?:[KMGT]i?B|bytes))", str(error)
        )
        asked = f" ({wanted[1]} more were asked for)" if wanted else ""
        raise UserError(
            f"the device {jax.devices()[0].device_kind} ran out of memory{asked}: "
            f"{'; or '.join(advice)}."
        ) from error


def memory_advice(config: Config) -> list[str]:
    """What makes a run need less memory, as far as its settings are not there yet."""
    grpo, sft, advice = config.grpo, config.sft, []
    for name, steps, micro in (
        ("grpo.micro_batch_prompts", grpo.steps, grpo.micro_batch_prompts),
        ("sft.micro_batch_rows", sft.steps, sft.micro_batch_rows),
    ):
        if steps and micro > 1:
            advice.append(f"lower {name}={micro}")
    if grpo.steps and config.rollout.batch_prompts > 1:
        advice.append(f"lower rollout.batch_prompts={config.rollout.batch_prompts}")
    if config.eval.batch_prompts > 1:
        advice.append(f"lower eval.batch_prompts={config.eval.batch_prompts}")
    if config.model.remat != "full":
        advice.append(f"set model.remat=full in place of {config.model.remat}")
    if config.model.dtype == "float32":
        advice.append("set model.dtype=bfloat16")
    for name, stage in (("sft", sft), ("grpo", grpo)):
        if stage.steps and not stage.lora.rank:
            advice.append(f"train adapters alone ({name}.lora.rank=64)")
    if not config.optim.offload:
        advice.append("let moments and reference rest in host memory (optim.offload=True)")
    advice.append("spread the weights over more devices (mesh.fsdp)")
    return advice

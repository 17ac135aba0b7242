"""TODO: parallel.compiler."""

import os
from importlib.metadata import entry_points

# Products with weights that are cut over chips are one gather and one product. By itself the
# compiler makes as many small ones as there are chips and sums them up: at a micro-batch's sizes
# all its activations are then read and written at every one of them.
_TPU_OPTION = "--xla_jf_spmd_threshold_for_windowed_einsum_mib"

# What the GPU's compiler is told, in a plan as well.
# - Products are cuBLAS's, with bias and residual added inside. It would try its own Triton kernels
#   beside them and leave those sums outside: on an H200 two kernels of 3 us in each layer of a
#   decode step, whose 36 layers then took 5.43 ms in place of 5.16. Where there is no GPU to try
#   them on, it may choose one that does not exist.
# - A product is computed once. Where a scan over layers keeps one, it would let cuBLAS write to
#   the stack, and recompute the same product for the layer itself: a fifth of what the 3B's
#   update multiplies, with `remat=dots`.
GPU_OPTIONS = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_enable_dynamic_slice_fusion": False,
}


def set_compiler_flags() -> None:
    """Sets options of the TPU's and of the GPU's compiler, before JAX looks for devices.

    A user's own stay; the GPU's are set where JAX has a CUDA plugin.
    """
    _tell("LIBTPU_INIT_ARGS", _TPU_OPTION, "1000000")
    if any("cuda" in plugin.name for plugin in entry_points(group="jax_plugins")):
        for option, value in GPU_OPTIONS.items():
            _tell("XLA_FLAGS", f"--{option}", str(value).lower())


def _tell(variable: str, option: str, value: str) -> None:
    given = os.environ.get(variable, "").split()
    in_a_file = given and not given[0].startswith("-")
    if not in_a_file and all(word.split("=")[0] != option for word in given):
        os.environ[variable] = " ".join([*given, f"{option}={value}"])

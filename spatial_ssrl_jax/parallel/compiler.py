"""Compiler flags for TPUs and GPUs, set before JAX initialises its backends."""

import os
from importlib.metadata import entry_points

# A matmul with sharded weights is one all-gather and one matmul. By default the compiler splits it
# into as many small matmuls as there are chips and sums them: at a micro-batch's sizes each of them
# reads and writes all activations.
_TPU_OPTION = "--xla_jf_spmd_threshold_for_windowed_einsum_mib"

# Options of the GPU's compiler, for training and for plans.
# - Matmuls run in cuBLAS, with bias and residual fused. With its own Triton kernels the compiler
#   leaves those sums outside: on an H200 two kernels of 3 us in each layer of a decode step, whose
#   36 layers then take 5.43 ms instead of 5.16. Without a GPU to autotune on, it may choose a
#   kernel that does not exist.
# - A matmul is computed once. Where a scan over layers stores its result, dynamic-slice fusion lets
#   cuBLAS write to the stack and recomputes the same matmul for the layer itself: a fifth of the
#   3B's update FLOPs with `remat=dots`.
GPU_OPTIONS = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_enable_dynamic_slice_fusion": False,
}


def set_compiler_flags() -> None:
    """Sets compiler options of TPUs and, where JAX has a CUDA plugin, of GPUs.

    Call it before JAX looks for devices. Options that the user has set stay.
    """
    _set_flag("LIBTPU_INIT_ARGS", _TPU_OPTION, "1000000")
    if any("cuda" in plugin.name for plugin in entry_points(group="jax_plugins")):
        for option, value in GPU_OPTIONS.items():
            _set_flag("XLA_FLAGS", f"--{option}", str(value).lower())


def _set_flag(variable: str, option: str, value: str) -> None:
    flags = os.environ.get(variable, "").split()
    is_file = bool(flags) and not flags[0].startswith("-")
    if not is_file and all(flag.split("=")[0] != option for flag in flags):
        os.environ[variable] = " ".join([*flags, f"{option}={value}"])

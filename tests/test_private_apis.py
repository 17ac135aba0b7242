"""What is used of JAX and Transformers outside their public APIs is still there.

Imports nothing of the package, which fails to import where one of these is missing. Run alone, so
that the test can say which: `python -m pytest --noconftest tests/test_private_apis.py`.
"""

import importlib

import pytest

_SPLASH_MASKS = "jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask"
_PIL_PROCESSOR = "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl"


def look_up(module: str, path: str, used_by: str) -> object:
    """The attribute at a dotted path of a module; a failure names the first part that is gone."""
    try:
        value = importlib.import_module(module)
    except ImportError as error:
        pytest.fail(f"{used_by} imports {module}, which this version lacks: {error}")
    reached = module
    for name in path.split("."):
        if not hasattr(value, name):
            pytest.fail(f"{used_by} reads {module}.{path}, but {reached} has no {name}")
        value, reached = getattr(value, name), f"{reached}.{name}"
    return value


@pytest.mark.parametrize("name", ["client", "process_id", "num_processes"])
def test_jax_has_the_state_of_its_processes(name: str):
    look_up("jax._src.distributed", f"global_state.{name}", "parallel/distributed.py")


@pytest.mark.parametrize("name", ["key_value_set", "key_value_dir_get", "blocking_key_value_get"])
def test_jax_has_the_key_value_store(name: str):
    look_up("jaxlib._jax", f"DistributedRuntimeClient.{name}", "parallel/distributed.py")


def test_jax_has_the_class_that_a_groups_mask_extends():
    base = look_up(_SPLASH_MASKS, "_ComputableMask", "qwen_vl/splash.py")
    mask = base((8, 8), lambda query, key: query >= key)
    for name in ("mask_function", "q_sequence"):  # read by the kernel
        assert hasattr(mask, name), f"{_SPLASH_MASKS}._ComputableMask no longer sets {name}"


@pytest.mark.parametrize("name", ["Qwen2VLImageProcessorPil", "smart_resize"])
def test_transformers_has_the_image_processor(name: str):
    look_up(_PIL_PROCESSOR, name, "data/processor.py")


@pytest.mark.parametrize(
    ("module", "path", "used_by"),
    [
        ("jax._src.cudnn.fused_attention_stablehlo", "check_cudnn_version", "tests/qwen_vl"),
        ("jax._src.clusters.cloud_tpu_cluster", "running_in_cloud_tpu_vm", "tests/trainer"),
    ],
)
def test_jax_has_what_tests_replace(module: str, path: str, used_by: str):
    look_up(module, path, used_by)

"""Weights are loaded into the sharded layout without being in host memory twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from spatial_ssrl_jax.qwen_vl.family import config_from_dict, config_to_dict
from spatial_ssrl_jax.qwen_vl.qwen2_5 import TOKEN_IDS
from spatial_ssrl_jax.qwen_vl.weights import entries
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads peak memory from Linux's /proc"
)

GIB = 1 << 30
# The high-water mark of the process's own memory map: that of `getrusage` may be the parent's.
LOAD = """
import sys
import jax
from spatial_ssrl_jax.config.schema import MeshSettings
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.checkpoint.models import open_model

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

layout = Layout(make_mesh(MeshSettings(data=1, fsdp=4, tensor=1)))
jax.block_until_ready(jax.device_put(jax.numpy.zeros(8), layout.replicated()))
before = peak()
params = jax.block_until_ready(open_model(sys.argv[1]).load(layout))
held = sum(x.nbytes for x in jax.tree.leaves(params))
shard = max(x.addressable_shards[0].data.nbytes / x.nbytes for x in jax.tree.leaves(params)
            if x.nbytes > held / 50)
print(before, peak(), held, shard)
"""


def write_zeros(folder: Path, shared: Path, layers: int, **text) -> int:
    """A folder of the 3B's config with some sizes changed and one file a parameter; its bytes."""
    raw = json.loads((shared / "qwen2_5_vl" / "3b" / "config.json").read_text())
    raw |= {"num_hidden_layers": layers, **text}
    thin = dict(depth=2, hidden_size=320, intermediate_size=320, num_heads=4)
    raw["vision_config"] |= {**thin, "out_hidden_size": raw["hidden_size"]}
    config = config_from_dict(raw, "test")
    (folder / "config.json").write_text(json.dumps(config_to_dict(config, "bfloat16")))
    total = 0
    for number, entry in enumerate(entries(config)):
        tensors = {name: np.zeros(entry.hub_shape, ml_dtypes.bfloat16) for name in entry.hub_names}
        total += sum(x.nbytes for x in tensors.values())
        save_file(tensors, folder / f"part-{number:02d}.safetensors")
    return total


def load(folder: Path) -> tuple[int, int, int, float]:
    """Bytes before loading, at the peak and of the weights; the largest fraction on one device."""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", LOAD, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    before, peak, held, shard = map(float, done.stdout.split())
    print(
        f"measured before {before / GIB:.2f}, peak {peak / GIB:.2f}, weights {held / GIB:.2f} GiB"
    )
    return int(before), int(peak), int(held), shard


def test_a_small_checkpoint_is_not_held_twice(shared, tmp_path):
    """Seven matrices a layer of equal size: one of them more than the weights, not all."""
    text = dict(hidden_size=1024, num_key_value_heads=16, intermediate_size=1024)
    text |= {name: number for number, name in enumerate(TOKEN_IDS)}  # of a small vocabulary
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [8, 12, 12]}
    total = write_zeros(tmp_path, shared, layers=12, vocab_size=2048, **text)
    before, peak, held, shard = load(tmp_path)
    assert total == held > 100e6 and shard < 0.3
    assert peak - before < 1.6 * total


@pytest.mark.slow
def test_two_gigabytes(shared, tmp_path):
    """The 3B's widths and vocabulary with nine layers."""
    total = write_zeros(tmp_path, shared, layers=9)
    _, peak, held, _ = load(tmp_path)
    assert total == held > 2e9
    assert peak < 1.25 * total + GIB

"""Gradients, a step and prompts' caches on meshes: as on one device, and where they should are."""

from tests.helpers.processes import printed

ON_MESHES = """
import jax, numpy as np, optax
from spatial_ssrl_jax.config.schema import GrpoSettings, MeshSettings
from spatial_ssrl_jax.rl import train_step as update
from spatial_ssrl_jax.rl.losses import GrpoLoss
from spatial_ssrl_jax.rl.train_step import (
    gradient_shardings,
    micro_gradients,
    initial_train_state,
    param_shardings,
    train_step,
)
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.rollout.cache import prefix_shardings
from spatial_ssrl_jax.rollout.decode import prefill
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.parallel.mesh import make_mesh
from tests.conftest import random_params
from spatial_ssrl_jax.data.batching import pad_prompts
from tests.rl.conftest import CONFIG, mixed, mixed_prompts

update.slice_count = lambda mesh: mesh.shape["data"]  # as if each copy of the weights were one
once = mixed.__wrapped__(mixed_prompts.__wrapped__())
both = once.packed(CONFIG, [[0], [1], [2]]), pad_prompts(once.prompts, 40, 100)
batch, prompts = jax.tree.map(lambda x: np.concatenate([x] * 3)[:8] if np.ndim(x) else x, both)
optimizer, first = optax.sgd(0.1), None


def alike(places, arrays):
    for x, place in zip(jax.tree.leaves(arrays), places, strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim), (x.shape, x.sharding, place)


for sizes in ((1, 1, 1), (2, 4, 1), (2, 2, 2)):
    layout = Layout(make_mesh(MeshSettings(*sizes), jax.devices()[: np.prod(sizes)]))
    sampling = layout.rollout(min(2, np.prod(sizes)))
    compute = Compute(attention_chunk=16, vocab_block=32, batch_sharding=layout.batch_sharding())
    put = jax.device_put(random_params(CONFIG, seed=0), layout.param_shardings(CONFIG))
    rows, loss = layout.put_batch(batch), GrpoLoss(CONFIG, compute, GrpoSettings(group_size=4))
    gradients, _ = micro_gradients(loss, put, {}, rows, gradient_shardings(put))
    alike(gradient_shardings(put), gradients)
    hidden, prefix = prefill(CONFIG, compute, put, layout.put_batch(prompts), sampling)
    asked = prefix_shardings(CONFIG.text, sampling)
    alike(jax.tree.leaves((sampling.batch_sharding(), asked)), (hidden, prefix))
    places, state = param_shardings(put), initial_train_state(optimizer, put)
    state, _ = train_step(loss, optimizer, state, [rows, rows])  # uses the weights up
    alike(places, state.trained)
    found = (gradients, hidden, prefix.layers, state.trained)
    found = [np.asarray(x) for x in jax.tree.leaves(found)]
    first = first or found
    print(max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, first, strict=True)))
"""


def test_meshes_give_what_one_device_gives():
    """With copies of the weights; sampling reshards 2 x 4 to 4 x 2, no part of its axes."""
    apart = printed(ON_MESHES, devices=8)
    assert len(apart) == 3 and max(apart) < 1e-5, apart

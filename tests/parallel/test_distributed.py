"""The private state of JAX that `process_group` reads."""

import inspect

from jax._src import distributed
from jaxlib import _jax

from spatial_ssrl_jax.parallel.distributed import KeyValueClient, ProcessGroup, process_group

WHERE = "parallel/distributed.py reads jax._src.distributed.global_state: see what replaced it"


def test_jax_still_has_the_state_of_its_processes():
    state = distributed.global_state
    missing = [n for n in ("client", "process_id", "num_processes") if not hasattr(state, n)]
    assert not missing, f"JAX has no {missing} now. {WHERE}"


def test_jax_still_has_the_key_value_store():
    names = [name for name, _ in inspect.getmembers(KeyValueClient, inspect.isfunction)]
    names = [name for name in names if "key_value" in name]
    assert len(names) == 3
    missing = [name for name in names if not hasattr(_jax.DistributedRuntimeClient, name)]
    assert not missing, f"JAX's client has no {missing} now. {WHERE}"


def test_a_single_process_is_a_group_of_one():
    assert process_group() == ProcessGroup(client=None, process_id=0, num_processes=1)

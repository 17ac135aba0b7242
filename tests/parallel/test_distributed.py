"""The processes of a run as `process_group` reads them from JAX."""

import inspect
from types import SimpleNamespace

import pytest

from spatial_ssrl_jax.parallel import distributed
from spatial_ssrl_jax.parallel.distributed import KeyValueClient, ProcessGroup, process_group
from tests import test_private_apis


def test_every_method_of_the_store_is_looked_for():
    """`test_private_apis` names the methods again, because it imports nothing of the package."""
    names = {name for name, _ in inspect.getmembers(KeyValueClient, inspect.isfunction)}
    names = {name for name in names if not name.startswith("_")}
    (mark,) = test_private_apis.test_jax_has_the_key_value_store.pytestmark
    assert names == set(mark.args[1])


def test_the_others_wait_for_what_the_primary_does_alone(monkeypatch: pytest.MonkeyPatch):
    called = []
    client = SimpleNamespace(
        key_value_set=lambda *a, **_: called.append(("set", a[0])),
        blocking_key_value_get=lambda *a: called.append(("get", *a)),
    )
    for process in (0, 1):
        group = ProcessGroup(client, process, 2)
        monkeypatch.setattr(distributed, "process_group", lambda group=group: group)
        distributed.await_primary("x", 900)
    assert called == [("set", "ready/x"), ("get", "ready/x", 900_000)]


def test_a_single_process_is_a_group_of_one():
    assert process_group() == ProcessGroup(client=None, process_id=0, num_processes=1)

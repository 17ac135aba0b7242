"""Checkpoints: restored bit for bit, the right ones kept, unfinished ones skipped."""

import dataclasses
import os
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spatial_ssrl_jax.checkpoint.checksums import find_damage, write_checksums
from spatial_ssrl_jax.checkpoint.manager import Checkpoints, set_aside_damaged
from spatial_ssrl_jax.checkpoint.params import (
    load_params,
    save_params,
    stored_params,
    weight_folders,
)
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.parallel import offload
from spatial_ssrl_jax.rl.train_step import TrainState, initial_train_state


def state(seed: int, frozen: bool = False) -> TrainState:
    """A state whose every leaf, optimizer moments and counters too, is random."""
    params = {"a": {"kernel": jnp.zeros((3, 4))}, "b": jnp.zeros(5, jnp.bfloat16)}
    empty = initial_train_state(
        optax.adamw(1e-3), params, {"a": {"bias": jnp.zeros(2, jnp.bfloat16)}} if frozen else {}
    )
    rng = np.random.default_rng(seed)

    def draw(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, 99, x.shape), x.dtype)
        return jnp.asarray(rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(draw, empty)


def assert_same(ours, theirs) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(folder: Path, steps: list[int], **options) -> None:
    checkpoints = Checkpoints(str(folder), **options)
    for step in steps:
        checkpoints.save(step, "sft", state(step), {"step": step})
    checkpoints.wait()
    checkpoints.close()


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_a_state_comes_back_bit_for_bit_in_another_manager(tmp_path: Path):
    checkpoints = Checkpoints(str(tmp_path / "c"), keep=2)
    assert checkpoints.latest() is None
    meta = {"config": {"tasks": {"flip": {"weight": 1.5}}}, "stage": "grpo", "list": [1, None]}
    checkpoints.save(7, "grpo", state(1), meta)
    checkpoints.wait()
    checkpoints.close()

    again = Checkpoints(str(tmp_path / "c"), keep=2)
    assert again.latest() == 7
    restored, found = again.restore(7, state(2))
    assert_same(restored, state(1))
    assert found == meta and again.read_meta(7) == meta
    assert weight_folders(tmp_path / "c" / "7") == [tmp_path / "c" / "7" / "params"]
    again.close()


@pytest.mark.parametrize("saved", [False, True], ids=["from the device", "from the host"])
@pytest.mark.parametrize("wanted", [False, True], ids=["to the device", "to the host"])
def test_moments_come_back_to_where_they_are_to_rest(tmp_path: Path, saved: bool, wanted: bool):
    """`optim.offload` may be switched on or off between the runs."""

    def resting(state: TrainState, on_host: bool) -> TrainState:
        if not on_host:
            return state
        return dataclasses.replace(state, opt_state=offload.to_host(state.opt_state))

    checkpoints = Checkpoints(str(tmp_path), keep=2)
    checkpoints.save(7, "grpo", resting(state(1), saved), {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(7, resting(state(2), wanted))
    checkpoints.close()
    assert_same(restored, state(1))
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(restored.opt_state)}
    assert kinds == {"pinned_host" if wanted else "device"}


def test_frozen_weights_are_written_once_a_stage(tmp_path: Path):
    first, other = state(1, frozen=True), state(2, frozen=True)
    checkpoints = Checkpoints(str(tmp_path), keep=3)
    checkpoints.save(1, "sft", first, {})
    checkpoints.wait()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "frozen_sft").rglob("*")}
    later = dataclasses.replace(state(3, frozen=True), frozen=first.frozen)
    checkpoints.save(2, "sft", later, {})
    checkpoints.save(3, "grpo", other, {})
    checkpoints.close()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "frozen_sft").rglob("*")} == written

    again = Checkpoints(str(tmp_path), keep=3)
    for step, expected in ((1, first), (2, later), (3, other)):
        assert_same(again.restore(step, state(9, frozen=True))[0], expected)
        trained, frozen = weight_folders(tmp_path / str(step))
        assert_same(load_params(trained, expected.trained), expected.trained)
        assert_same(load_params(frozen, expected.frozen), expected.frozen)
    assert stored_params(frozen)["a"]["bias"].dtype == jnp.bfloat16
    again.close()


def test_the_newest_and_the_ones_kept_always_stay(tmp_path: Path):
    save(tmp_path, [1, 2, 3, 4, 5], keep=2, always=[2])
    assert kept(tmp_path) == [2, 4, 5]


def test_the_best_stays_until_another_is(tmp_path: Path):
    checkpoints = Checkpoints(str(tmp_path), keep=1)
    for step, best in ((1, 1), (2, 1), (3, 1)):
        checkpoints.save(step, "sft", state(step), {}, best)
    checkpoints.close()
    assert kept(tmp_path) == [1, 3]
    again = Checkpoints(str(tmp_path), keep=1)
    again.save(4, "sft", state(4), {}, 1)
    again.wait()
    assert kept(tmp_path) == [1, 4]
    again.save(5, "sft", state(5), {}, 5)
    again.save(6, "sft", state(6), {}, 5)
    again.close()
    assert kept(tmp_path) == [5, 6]


def test_a_half_written_checkpoint_is_skipped(tmp_path: Path):
    save(tmp_path, [3], keep=2)
    # What a kill leaves: Orbax writes under a temporary name and renames when all is there.
    shutil.copytree(tmp_path / "3", tmp_path / "6.orbax-checkpoint-tmp")
    shutil.rmtree(tmp_path / "6.orbax-checkpoint-tmp" / "training")
    messages = []
    set_aside_damaged(tmp_path, messages.append)
    assert not messages and kept(tmp_path) == [3] and not list(tmp_path.glob("*tmp*"))
    again = Checkpoints(str(tmp_path), keep=2)
    assert again.latest() == 3
    assert_same(again.restore(3, state(0))[0], state(3))
    again.save(6, "sft", state(6), {})
    again.wait()
    assert again.latest() == 6
    again.close()


def test_what_is_being_written_stays_when_checkpoints_are_opened(tmp_path: Path):
    """Frozen weights are written beside Orbax's manager, which would take them for a leftover."""
    (writing := tmp_path / "frozen_sft.orbax-checkpoint-tmp").mkdir()
    checkpoints = Checkpoints(str(tmp_path), keep=2)
    checkpoints.save(1, "sft", state(1), {})
    checkpoints.close()
    assert writing.is_dir()


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "altered": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "missing": None,
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("item", ["params", "training", "meta"])
def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path: Path, item: str, how: str):
    save(tmp_path, [3, 6], keep=3)
    largest = max((tmp_path / "6" / item).rglob("*"), key=lambda p: p.is_file() * p.stat().st_size)
    if DAMAGES[how] is None:
        largest.unlink()
    else:
        largest.write_bytes(DAMAGES[how](largest.read_bytes()))
    messages = []
    set_aside_damaged(tmp_path, messages.append)
    assert (
        len(messages) == 1
        and "step 6" in messages[0]
        and item in messages[0]
        and how in messages[0]
    )
    again = Checkpoints(str(tmp_path), keep=3)
    assert again.latest() == 3
    assert_same(again.restore(3, state(0))[0], state(3))
    again.save(6, "sft", state(6), {})
    again.wait()
    again.close()
    set_aside_damaged(tmp_path, messages.append)
    assert len(messages) == 1 and kept(tmp_path) == [3, 6] and (tmp_path / "damaged_6").is_dir()


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_the_last_one_stays(tmp_path: Path):
    checkpoints = Checkpoints(str(tmp_path), keep=3)
    checkpoints.save(3, "sft", state(3), {})
    checkpoints.wait()
    later = state(6)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))  # as a full disk: writes fail
    try:
        with pytest.raises(UserError, match=r"step 6 could not be saved .* resumes after step 3"):
            checkpoints.save(6, "sft", later, {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    again = Checkpoints(str(tmp_path), keep=3)
    assert again.latest() == 3
    assert_same(again.restore(3, state(0))[0], state(3))
    again.close()


def test_weights_alone_come_back_bit_for_bit(tmp_path: Path):
    save_params(tmp_path / "params", state(4).params)
    assert_same(load_params(tmp_path / "params", state(0).params), state(4).params)


@pytest.mark.parametrize(
    "like",
    [
        {"a": {"kernel": jnp.zeros((4, 4))}, "b": jnp.zeros(5, jnp.bfloat16)},
        {"a": {"kernel": jnp.zeros((3, 4))}, "c": jnp.zeros(5, jnp.bfloat16)},
    ],
    ids=["shape", "name"],
)
def test_weights_of_another_model_are_an_error_that_names_the_folder(tmp_path: Path, like):
    save_params(tmp_path / "params", state(4).params)
    with pytest.raises(UserError, match="params is not a checkpoint of this model"):
        load_params(tmp_path / "params", like)


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="nowhere is not a checkpoint"):
        load_params(tmp_path / "nowhere", state(0).params)


@pytest.mark.parametrize("entry", ["1", "[1]", '"a"', '["1", "2"]', "null", "[" * 9999])
def test_damaged_checksums_count_as_damage(tmp_path: Path, entry: str):
    (tmp_path / "a").write_text("x")
    write_checksums(tmp_path)
    assert find_damage(tmp_path) is None
    (tmp_path / "checksums.json").write_text(f'{{"a": {entry}}}')
    assert find_damage(tmp_path) == "checksums.json is damaged"


def test_a_pipe_in_a_checkpoint_counts_as_damage(tmp_path: Path):
    os.mkfifo(tmp_path / "a")
    assert find_damage(tmp_path) == "a is no file"


@pytest.mark.parametrize("content", ["", "[]", '{"frozen": {}, "run": {}}', '{"frozen": null}'])
def test_damaged_meta_is_named(tmp_path: Path, content: str):
    """Of a checkpoint without checksums, which would tell."""
    save(tmp_path, [1, 2], keep=2)
    (tmp_path / "2" / "meta" / "metadata").write_text(content)
    checkpoints = Checkpoints(str(tmp_path), keep=2)
    with pytest.raises(UserError, match="/2.*: rename the newest step, and the same command"):
        checkpoints.restore(2, state(1))
    assert checkpoints.read_meta(1) == {"step": 1}
    checkpoints.close()

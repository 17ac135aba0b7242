"""Compiled programs outlive a process: in a folder or a bucket, bounded, safe against kills."""

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from spatial_ssrl_jax.common.paths import user_path
from spatial_ssrl_jax.config import CompileSettings
from spatial_ssrl_jax.parallel.compilation_cache import FOLDER, compilation_cache
from tests.helpers.fake_storage import Storage

DIRECTORY = "jax_compilation_cache_dir"
EVENTS: Counter[str] = Counter()
jax.monitoring.register_event_listener(lambda event, **_: EVENTS.update([event]))


@pytest.fixture(autouse=True)
def no_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """JAX as it starts without a cache of the environment; programs of any time are stored."""
    monkeypatch.delenv(DIRECTORY.upper())
    before = getattr(jax.config, DIRECTORY)
    jax.config.update(DIRECTORY, None)
    reset_cache()
    yield
    jax.config.update(DIRECTORY, before)
    reset_cache()


def started(workdir: Path | epath.Path, *, program: int = 0, **settings) -> tuple[bool, list[str]]:
    """Runs a program in a new start of a run; whether it was read, and what was said."""
    said: list[str] = []
    jax.clear_caches()
    x = np.ones(8, np.float32)
    with compilation_cache(CompileSettings(**settings), epath.Path(workdir), said.append):
        before = EVENTS["/jax/compilation_cache/cache_hits"]
        assert float(jax.jit(lambda x: (x + x).sum() + program)(x)) == 16 + program
        read = EVENTS["/jax/compilation_cache/cache_hits"] - before
    assert getattr(jax.config, DIRECTORY) is None
    return read == 1, said


def entries(workdir: Path) -> list[Path]:
    return list((workdir / FOLDER).glob("*-cache"))


def test_the_next_start_reads_what_a_run_compiled(tmp_path: Path):
    assert started(tmp_path) == (False, [])
    assert started(tmp_path) == (True, [])
    assert started(tmp_path, program=1) == (False, [])


def test_an_entry_that_a_kill_cut_off_is_compiled_again(tmp_path: Path):
    started(tmp_path)
    (entry,) = entries(tmp_path)
    whole, time = entry.read_bytes(), entry.with_name(entry.name.replace("-cache", "-atime"))
    entry.write_bytes(whole[:100])
    time.unlink()  # JAX writes it after the entry
    with warnings.catch_warnings(action="error"):
        started(tmp_path)
    assert len(entry.read_bytes()) > 100 and time.exists()
    entry.write_bytes(whole[:100])  # by another process, after this one has looked
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        started(tmp_path)


def test_the_folder_stays_below_its_size(tmp_path: Path):
    started(tmp_path)
    size = 4 * entries(tmp_path)[0].stat().st_size
    for program in range(1, 7):
        started(tmp_path, program=program, cache_gb=size / 1e9)
    found = entries(tmp_path)
    assert len(found) > 1 and sum(entry.stat().st_size for entry in found) <= size
    assert started(tmp_path, program=6)[0] and not started(tmp_path, program=1)[0]


def test_a_bucket_keeps_programs_and_is_reduced_at_a_start(
    bucket: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    workdir, folder = user_path("gs://bucket/run"), f"run/{FOLDER}/"
    assert [started(workdir, program=n)[0] for n in (0, 1, 0)] == [False, False, True]
    names = bucket.names("bucket", folder)
    assert len(names) == 2 and all(name.endswith("-cache") for name in names)
    largest = max(len(bucket.read("bucket", name)) for name in names)
    assert started(workdir, program=1, cache_gb=largest / 1e9) == (True, [])
    assert len(bucket.names("bucket", folder)) == 1
    assert not list(tmp_path.iterdir())  # JAX would make the lock of a bounded folder here


@pytest.mark.parametrize("why", ["is a file", "permission"])
def test_a_folder_that_cannot_be_written_is_reported_and_the_run_goes_on(
    why: str, tmp_path: Path, request: pytest.FixtureRequest
):
    (tmp_path / "file").touch()
    cache = str(tmp_path / "file" / "cache")
    if why == "permission":
        request.getfixturevalue("bucket").denied.add("storage.objects.create")
        cache = "gs://bucket/cache"
    read, said = started(tmp_path, cache=cache)
    assert not read and len(said) == 1 and why in said[0]
    assert said[0].startswith("compiled programs are not kept") and said[0].count(". ") == 0


@pytest.mark.parametrize("of", ["environment", "none", "off"])
def test_what_keeps_no_folder_of_the_run(of: str, tmp_path: Path):
    name = {"environment": DIRECTORY, "off": "jax_enable_compilation_cache"}.get(of)
    value = str(tmp_path / "mine") if of == "environment" else False
    before = getattr(jax.config, name) if name else None
    if name:
        jax.config.update(name, value)
    try:
        with compilation_cache(
            CompileSettings(cache="none" if of == "none" else ""), epath.Path(tmp_path), print
        ):
            assert getattr(jax.config, DIRECTORY) == (value if of == "environment" else None)
        assert not (tmp_path / FOLDER).exists()
    finally:
        if name:
            jax.config.update(name, before)

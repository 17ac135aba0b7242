"""A folder of compiled programs, JAX's persistent compilation cache, that outlives the process."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from etils import epath
from filelock import FileLock, Timeout
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.outputs import check_writable
from spatial_ssrl_jax.common.paths import absolute, check_bucket, in_bucket, user_path
from spatial_ssrl_jax.common.text import error_line
from spatial_ssrl_jax.config.schema import CompileSettings
from spatial_ssrl_jax.parallel.collectives import all_sum, is_primary

FOLDER = "compilation_cache"  # in a run's folder
# Of a restart's seventy smaller programs; each takes longer to look up in a bucket than to compile.
_LEAST_SECONDS = 0.1
# Names that JAX's cache writes: an entry, the time of its last use, and the lock of both.
_ENTRY, _TIME, _LOCK = "-cache", "-atime", ".lockfile"
_LOCK_SECONDS = 10  # that JAX waits for it too


@contextmanager
def compilation_cache(
    settings: CompileSettings, workdir: epath.Path, say: Callable[[str], None]
) -> Iterator[None]:
    """Inside, compiled programs are stored in a folder and read from it; the primary writes.

    A folder that cannot be used is reported, and programs are compiled without it. JAX's own
    options in the environment come first: `JAX_COMPILATION_CACHE_DIR` leaves all to JAX.

    Args:
      settings: the config's `compile` section.
      workdir: the run's folder, where the programs are by default.
      say: called with the message where the folder cannot be used.
    """
    ours = settings.cache != "none" and _option("jax_compilation_cache_dir") is None
    ours &= _option("jax_enable_compilation_cache")
    folder, size = settings.cache or workdir / FOLDER, round(settings.cache_gb * 1e9)
    usable = is_primary() and ours and _prepared(folder, size, say)
    if not all_sum(usable) or not ours:
        yield
        return
    options = _options(folder, size)
    before = {name: _option(name) for name in options}
    try:
        _set(options)
        yield
    finally:
        _set(before)
        reset_cache()


def _option(name: str) -> Any:
    return getattr(jax.config, name)  # whose stubs have no options


def _options(folder: epath.PathLike, size: int) -> dict[str, Any]:
    """JAX's options for a folder of at most `size` bytes, without those in the environment.

    JAX keeps the size with a file's lock, which a bucket does not have and which many processes
    that only read would wait for.
    """
    local = not in_bucket(folder)
    # JAX hashes the path of XLA's own cache, which only GPUs use and which has no `gs://`.
    kernels = local and jax.default_backend() == "gpu"
    options = {
        "jax_compilation_cache_dir": os.fspath(absolute(folder)),
        "jax_compilation_cache_max_size": size if local and is_primary() else -1,
        "jax_persistent_cache_min_compile_time_secs": _LEAST_SECONDS,
        "jax_persistent_cache_enable_xla_caches": (
            "xla_gpu_per_fusion_autotune_cache_dir" if kernels else "none"
        ),
    }
    return {name: value for name, value in options.items() if name.upper() not in os.environ}


def _set(options: dict[str, Any]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)


def _prepared(folder: epath.PathLike, size: int, say: Callable[[str], None]) -> bool:
    """Makes the folder ready and says whether it can be used."""
    try:
        folder = user_path(folder)
        if in_bucket(folder):
            check_bucket(folder)
            _remove_oldest(folder, size)
        else:
            check_writable(folder)
            Path(folder).mkdir(parents=True, exist_ok=True)
            _remove_unfinished(Path(folder))
    except Exception as error:  # whatever it is, the run needs no cache
        why = str(error) if isinstance(error, UserError) else f"{folder}: {error_line(error)}."
        say(f"compiled programs are not kept for the next start: {why}")
        return False
    return True


def _remove_unfinished(folder: Path) -> None:
    """Removes the entries whose writing a kill cut off.

    JAX writes an entry's time after the entry. It never replaces an entry that it cannot read, and
    version 0.10 writes no other where a time is missing.
    """
    try:
        with FileLock(folder / _LOCK, timeout=_LOCK_SECONDS):
            for entry in folder.glob(f"*{_ENTRY}"):
                if not entry.with_name(entry.name.removesuffix(_ENTRY) + _TIME).exists():
                    entry.unlink()
    except Timeout:
        pass  # another run is writing; JAX waits for it as long at each program


def _remove_oldest(folder: epath.Path, size: int) -> None:
    """Removes the programs that were written first, until a bucket's folder has `size` bytes."""
    import fsspec

    bucket = fsspec.filesystem("gcs")
    files = bucket.find(os.fspath(folder), detail=True).items()
    total = sum(info["size"] for _, info in files)
    for name, info in sorted(files, key=lambda file: file[1]["updated"]):
        if total <= size:
            break
        bucket.rm_file(name)
        total -= info["size"]

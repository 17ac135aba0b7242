"""Reading a file of `torch.save` that holds one rank's part of a model, without running its code.

Such a file is a pickle. torch restores tensors alone (`weights_only`), and every class of
`torch.distributed` that the file names is replaced by a stand-in that only holds attributes. So no
process group is needed, and the release of torch that wrote the file need not be the one here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.text import error_line

if TYPE_CHECKING:
    import torch

INSTEAD = "have verl write the model itself (hf_model in checkpoint.save_contents), and give that"
_REPLACED = "torch.distributed."
_DAMAGED = (  # what torch raises for a file that is damaged, or is none of its own
    UnpicklingError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
    EOFError,
    OSError,
)


@dataclass(frozen=True)
class Piece:
    """What one rank holds of a tensor.

    Attributes:
      local: the rank's part, perhaps empty; its values are read from the file when they are used.
      shape: of the whole.
      axis: along which the ranks share the whole; None where this rank holds all of it.
    """

    local: "torch.Tensor"
    shape: tuple[int, ...]
    axis: int | None


def check_torch(path: str) -> None:
    """Checks that torch can read the files.

    Raises:
      UserError: it is missing, or too old; `path` is named.
    """
    try:
        from torch.serialization import get_unsafe_globals_in_checkpoint  # noqa: F401
    except ImportError:
        raise UserError(
            f"{path} is read with torch 2.6 or later: pip install 'torch>=2.6' --index-url "
            "https://download.pytorch.org/whl/cpu (the CPU build is enough)."
        ) from None


def read_rank_file(path: Path) -> dict[str, Piece]:
    """The tensors of one rank, by the names in the file, which is mapped and not copied.

    Raises:
      UserError: the file is damaged, needs more than tensors and their sharding, or is sharded in
        another way than by FSDP.
    """
    with _only_tensors(), _explain_damage(path):
        return {name: _piece(f"{path}: {name}", value) for name, value in _load(path).items()}


def _load(path: Path) -> dict[str, Any]:
    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    names = sorted(get_unsafe_globals_in_checkpoint(path))
    if other := [name for name in names if not name.startswith(_REPLACED)]:
        raise UserError(
            f"{path} needs {other[0]}, and only tensors are read, because a pickle can run any "
            f"code: {INSTEAD}."
        )
    with safe_globals([_stand_in(name) for name in names]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


@contextmanager
def _only_tensors() -> Iterator[None]:
    """Nothing is restored but torch's own tensors, whatever was imported and marked as safe."""
    from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

    marked = get_safe_globals()
    clear_safe_globals()
    try:
        yield
    finally:
        add_safe_globals(marked)


@contextmanager
def _explain_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        raise UserError(f"{path} cannot be read ({error_line(error)}): copy it again.") from None


class _StandIn:
    """An object of a class that is not loaded: its attributes alone."""

    def __new__(cls, *_: Any) -> "_StandIn":
        return super().__new__(cls)


def _stand_in(name: str) -> type:
    """A class of this name that only holds attributes; for a DTensor, a tensor without values."""
    import torch

    module, _, name = name.rpartition(".")
    if name != "DTensor":
        return type(name, (_StandIn,), {"__module__": module})
    inert = {
        "__torch_function__": torch._C._disabled_torch_function_impl,
        "__torch_dispatch__": None,
    }
    return type(name, (torch.Tensor,), {"__module__": module} | inert)


def _piece(what: str, value: Any) -> Piece:
    import torch

    axis, local = None, value
    if type(value).__name__ == "DTensor":
        local, axis = value._local_tensor, _sharded_axis(what, value._spec.placements)
    kind = local.dtype if type(local) is torch.Tensor else type(local).__name__
    if kind not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"{what} is of {kind}, which is not read: {INSTEAD}.")
    if local.dim() != value.dim() or axis not in (None, *range(value.dim())):
        raise ValueError(f"a part of shape {tuple(local.shape)} of {tuple(value.shape)}")
    return Piece(local.detach(), tuple(value.shape), axis)


def _sharded_axis(what: str, placements: tuple[Any, ...]) -> int | None:
    """The axis that the last dimension of the mesh shards; over the others there are copies."""
    kinds = [type(placement).__name__ for placement in placements]
    if set(kinds) == {"Replicate"}:
        return None
    if set(kinds[:-1]) <= {"Replicate"} and kinds[-1] == "Shard":
        return placements[-1].dim
    raise UserError(
        f"{what} is placed as {', '.join(kinds)}, and only FSDP's own sharding is read: {INSTEAD}."
    )

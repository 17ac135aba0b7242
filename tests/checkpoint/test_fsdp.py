"""verl's checkpoints: shards that FSDP makes, merged bit for bit, and every fault named."""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from spatial_ssrl_jax import convert
from spatial_ssrl_jax.checkpoint.fsdp import open_fsdp
from spatial_ssrl_jax.checkpoint.models import TINY, open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.processor import PROCESSOR_FILES
from spatial_ssrl_jax.qwen_vl.weights import canonical_name

torch = pytest.importorskip("torch", reason="makes shards with torch's FSDP")
load_file = pytest.importorskip("safetensors.torch").load_file

State = dict[str, "torch.Tensor"]


@contextmanager
def process_group(rank: int, world: int) -> Iterator[None]:
    """One rank of a world that sends nothing."""
    from torch import distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    yield
    dist.destroy_process_group()


def make_model(folder: Path, tied: bool = True, dtype: str = "float32") -> "torch.nn.Module":
    """Transformers' model of a folder's config, with the same random weights each time."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    config = Qwen2_5_VLConfig.from_pretrained(folder)
    model = Qwen2_5_VLForConditionalGeneration(config).to(getattr(torch, dtype))
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    return model


def save_step(toy_folder: Path, step: Path, mesh_shape: tuple[int, ...], **options) -> State:
    """Writes what verl does, with FSDP2 over a mesh; returns the whole tensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    world = int(np.prod(mesh_shape))
    for rank in range(world):
        model = make_model(toy_folder, **options)
        whole = dict(model.state_dict())
        with process_group(rank, world):
            names = ("ddp", "fsdp")[-len(mesh_shape) :]
            mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
            for part in (*model.model.language_model.layers, model):
                fully_shard(part, mesh=mesh)
            step.mkdir(exist_ok=True)
            torch.save(model.state_dict(), step / f"model_world_size_{world}_rank_{rank}.pt")
    (step / f"optim_world_size_{world}_rank_0.pt").write_bytes(b"not read")
    shutil.copytree(toy_folder, step / "huggingface")
    return whole


@pytest.fixture(scope="module")
def step(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """A step of three ranks, of which the last has fewer rows of most tensors."""
    folder = tmp_path_factory.mktemp("run") / "actor"
    return folder, save_step(toy_folder, folder, (3,))


def assert_refused(result: tuple[int, str, str], said: str) -> None:
    code, printed, errors = result
    assert code == 2 and not printed and errors.count("\n") == 1 and "Traceback" not in errors
    assert re.search(said, " ".join(errors.split())), errors


def assert_merged(folder: Path, whole: State, dtype: str = "float32") -> None:
    """The folder is a whole export with these tensors, bit for bit."""
    config = open_model(str(folder)).config
    wanted = {canonical_name(config, name): tensor for name, tensor in whole.items()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    found = load_file(folder / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == getattr(torch, dtype)
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name
    settings = {*os.listdir(TINY)} & {*PROCESSOR_FILES}
    assert settings | {"config.json", "model.safetensors"} <= {*os.listdir(folder)}


@pytest.mark.parametrize(
    ("mesh", "needed"), [((1,), 1), ((2,), 2), ((3,), 3), ((2, 2), 2)], ids=str
)
def test_shards_are_merged_bit_for_bit(run, toy_folder, tmp_path, mesh, needed):
    """Of (ddp, fsdp) the first copy is enough."""
    whole = save_step(toy_folder, tmp_path / "actor", mesh)
    for rank in range(needed, int(np.prod(mesh))):
        (tmp_path / "actor" / f"model_world_size_{np.prod(mesh)}_rank_{rank}.pt").unlink()
    code, printed, _ = run(convert.main, "from-fsdp", tmp_path / "actor", tmp_path / "out")
    assert code == 0 and "parameters in float32" in printed
    assert_merged(tmp_path / "out", whole)


def test_a_dtype_is_cast_once(run, step, tmp_path):
    argv = ["from-fsdp", step[0], tmp_path / "out", "--dtype=bfloat16"]
    assert run(convert.main, *argv)[0] == 0
    assert_merged(tmp_path / "out", step[1], "bfloat16")


@pytest.mark.parametrize("tied", [True, False])
def test_one_rank_has_plain_tensors(run, toy_folder, tmp_path, tied):
    """FSDP1 does not shard over one rank. A head that differs from the embedding is kept."""
    whole = make_model(toy_folder, tied, "bfloat16").state_dict()
    actor = write_rank(tmp_path / "actor", toy_folder, whole)
    assert run(convert.main, "from-fsdp", actor, tmp_path / "out")[0] == 0
    assert open_model(str(tmp_path / "out")).config.tie_word_embeddings == tied
    assert_merged(tmp_path / "out", whole, "bfloat16")


def write_rank(actor: Path, toy_folder: Path, state: object) -> Path:
    """A step of one rank with this state."""
    actor.mkdir()
    shutil.copytree(toy_folder, actor / "huggingface")
    torch.save(state, actor / "model_world_size_1_rank_0.pt")
    return actor


class Evil:
    """What runs a command when a pickle is read."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch evil",)


class Plain:
    """A class that is neither a tensor nor of torch."""


def placed(outer: str, inner: str) -> State:
    """A tensor with these placements on a mesh of two by two ranks."""
    from torch.distributed import tensor as dtensor
    from torch.distributed.device_mesh import init_device_mesh

    kinds = {"shard": dtensor.Shard(0), "copy": dtensor.Replicate(), "sum": dtensor.Partial()}
    with process_group(0, 4):
        mesh = init_device_mesh("cpu", (2, 2))
        placements = [kinds[outer], kinds[inner]]
        return {"x": dtensor.DTensor.from_local(torch.ones(2, 2), mesh, placements)}


LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (lambda whole: {"x": Evil()}, "needs (posix|nt).system, and only tensors are read"),
        (lambda whole: {LORA: torch.ones(2)}, "convert merge-lora BASE .*actor/lora_adapter OUT"),
        (lambda whole: whole | {"score.weight": torch.ones(2)}, "also holds the tensor score"),
        (lambda whole: dict([*whole.items()][1:]), "lacks the tensor .* does not fit"),
        (lambda whole: {n: x[:1] for n, x in whole.items()}, "has shape .* asks for"),
        (lambda whole: {n: x / 0 for n, x in whole.items()}, "holds NaN or infinite"),
        (lambda whole: {"x": torch.ones(2, dtype=torch.int8)}, "x is of torch.int8"),
        (lambda whole: {"x": 3}, "x is of int, which is not read"),
        (lambda whole: [1], "cannot be read"),
        (lambda whole: placed("shard", "shard"), "x is placed as Shard, Shard, and only"),
        (lambda whole: placed("shard", "copy"), "x is placed as Shard, Replicate, and only"),
        (lambda whole: placed("copy", "sum"), "x is placed as Replicate, Partial, and only"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    run, step, toy_folder, tmp_path, monkeypatch, state: Callable, said: str
):
    monkeypatch.chdir(tmp_path)
    actor = write_rank(tmp_path / "actor", toy_folder, state(step[1]))
    assert_refused(run(convert.main, "from-fsdp", actor, tmp_path / "out"), said)
    assert os.listdir(tmp_path) == ["actor"]


def test_what_others_mark_as_safe_is_refused_too(toy_folder, tmp_path):
    """Importing DTensor marks its classes, which set themselves up as a file says."""
    actor = write_rank(tmp_path / "actor", toy_folder, {"x": Plain()})
    with torch.serialization.safe_globals([Plain]):
        with pytest.raises(UserError, match="needs .*Plain, and only tensors are read"):
            open_fsdp(str(actor)).load(None)
        assert Plain in torch.serialization.get_safe_globals()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


FIRST, LAST = (f"model_world_size_3_rank_{rank}.pt" for rank in (0, 2))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda actor: (actor / LAST).unlink(), f"{LAST} is missing: copy the files of all"),
        (lambda actor: (actor / FIRST).unlink(), "holds no model_world_size"),
        (lambda actor: truncate(actor / LAST), f"{LAST} cannot be read"),
        (lambda actor: shutil.copy(actor / FIRST, actor / LAST), "has shape .* leave"),
        (lambda actor: shutil.copy(actor / LAST, actor / FIRST), "hold .* of the .* rows of"),
        (lambda actor: torch.save({}, actor / LAST), f"{LAST} lacks the tensor"),
        (
            lambda actor: shutil.copy(actor / FIRST, actor / "model_world_size_8_rank_0.pt"),
            "holds shards of 3 ranks and of 8: remove",
        ),
        (lambda actor: shutil.rmtree(actor / "huggingface"), "config.json is missing: copy the"),
        (lambda actor: shutil.rmtree(actor), "does not exist: give the actor/ folder"),
    ],
)
def test_steps_that_are_damaged_are_refused(run, step, tmp_path, damage: Callable, said: str):
    shutil.copytree(step[0], tmp_path / "actor")
    damage(tmp_path / "actor")
    assert_refused(run(convert.main, "from-fsdp", tmp_path / "actor", tmp_path / "out"), said)
    assert not (tmp_path / "out").exists()


def test_without_torch_it_is_named(run, step, tmp_path, monkeypatch):
    for name in ("torch", "torch.serialization"):
        monkeypatch.setitem(sys.modules, name, None)
    result = run(convert.main, "from-fsdp", step[0], tmp_path / "out")
    assert_refused(result, "is read with torch 2.6 or later: pip install 'torch>=2.6'")


def test_the_output_may_not_hold_the_step(run, step, tmp_path):
    shutil.copytree(step[0], tmp_path / "actor")
    argv = ["from-fsdp", tmp_path / "actor", tmp_path / "actor", "--overwrite"]
    assert_refused(run(convert.main, *argv), "holds what is read")
    assert (tmp_path / "actor" / LAST).is_file()


@pytest.mark.parametrize("below", ["", "huggingface"])
def test_a_step_given_as_a_model_is_named(step, below: str):
    with pytest.raises(UserError, match="convert from-fsdp .*actor OUT"):
        open_model(str(step[0] / below)).check_weights()

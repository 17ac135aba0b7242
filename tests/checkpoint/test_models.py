"""Opening a model wherever it is, exporting it whole or not at all, and claiming a folder."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from spatial_ssrl_jax.checkpoint import export as export_module
from spatial_ssrl_jax.checkpoint.export import copy_files, export, write_config
from spatial_ssrl_jax.checkpoint.models import TINY, ModelFolder, open_model
from spatial_ssrl_jax.checkpoint.params import PARAMS, save_params
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import MeshSettings
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.model import abstract_params
from tests.conftest import ROOT, random_params


@pytest.fixture(scope="module")
def layout() -> Layout:
    return Layout(make_mesh(MeshSettings()))


@pytest.fixture(scope="module")
def params():
    return random_params(open_model("tiny").config, seed=3)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, params) -> Path:
    folder = tmp_path_factory.mktemp("models") / "hf"
    export(open_model("tiny"), params, folder, "float32")
    return folder


def assert_same(ours, theirs) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_initial_weights_follow_the_seed(toy, layout: Layout):
    model = ModelFolder(toy.config, TINY, epath.Path(TINY), "toy")
    first, again, other = (model.init(layout, seed=seed) for seed in (3, 3, 4))
    assert_same(first, again)
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
    assert any(not np.array_equal(a, b) for a, b in pairs)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(first))


@pytest.mark.parametrize(
    "page", ["README.md", "configs/tiny.py", "spatial_ssrl_jax/assets/make_tiny.py"]
)
def test_pages_give_the_tiny_models_size(page: str):
    sizes = jax.tree.leaves(abstract_params(open_model("tiny").config))
    count = sum(leaf.size for leaf in sizes)
    assert f"{count:,}" in (ROOT / page).read_text()


def test_an_export_opens_with_the_same_weights_and_files(exported: Path, layout: Layout, params):
    model = open_model(str(exported))
    assert model.config == open_model("tiny").config
    assert_same(model.load(layout), params)
    assert {"config.json", "vocab.json", "merges.txt", "tokenizer_config.json"} <= {
        path.name for path in exported.iterdir()
    }
    assert exported.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in exported.parent.iterdir()] == ["hf"]


def test_an_export_that_fails_leaves_nothing(
    tmp_path: Path, params, monkeypatch: pytest.MonkeyPatch
):
    def fail(folder: Path, *_) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(export_module, "write_params", fail)
    with pytest.raises(OSError, match="disk full"):
        export(open_model("tiny"), params, tmp_path / "out", "float32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_orbax_folder_keeps_its_dtype_unless_one_is_given(
    tmp_path: Path, layout: Layout, params, dtype: str
):
    tiny = open_model("tiny")
    held = jax.tree.map(lambda x: x.astype(dtype), params)
    copy_files(tiny, tmp_path)
    write_config(tiny.config, tmp_path, dtype)
    save_params(tmp_path / PARAMS, held)
    model = open_model(str(tmp_path))
    assert_same(model.load(layout), held)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), held)
    assert_same(model.load(layout, "float32"), wide)


def test_a_value_that_is_not_finite_is_named(tmp_path: Path, layout: Layout, params):
    tiny = open_model("tiny")
    broken = jax.tree.map(lambda x: x, params)
    down = broken["text"]["layers"]["mlp"]["down"]
    down["kernel"] = down["kernel"].at[1, 2, 3].set(jnp.nan)
    export(tiny, broken, tmp_path / "hf", "float32")
    copy_files(tiny, tmp_path)
    write_config(tiny.config, tmp_path, "float32")
    save_params(tmp_path / PARAMS, broken)
    for folder in (tmp_path / "hf", tmp_path):
        with pytest.raises(UserError, match=f"{folder}: the tensor model.layers.1.mlp.down_proj."):
            open_model(str(folder)).load(layout)


def test_values_that_a_dtype_cannot_hold_are_named(tmp_path: Path, layout: Layout, params):
    large = jax.tree.map(lambda x: x, params)
    large["text"]["norm"]["scale"] = large["text"]["norm"]["scale"].at[0].set(3.4e38)
    export(open_model("tiny"), large, tmp_path / "hf", "float32")
    model = open_model(str(tmp_path / "hf"))
    model.load(layout)
    with pytest.raises(UserError, match=r"the tensor model.norm.weight holds NaN or infinite"):
        model.load(layout, "bfloat16")


def test_dtypes_are_kept_weight_by_weight(tmp_path: Path, layout: Layout, params):
    """Layers of one stack get the dtype that holds all of theirs."""
    folder = tmp_path / "hf"
    export(open_model("tiny"), params, folder, "bfloat16")
    tensors = load_file(folder / "model.safetensors")
    wide = ("model.norm.weight", "model.layers.1.mlp.down_proj.weight")
    for name in wide:
        tensors[name] = tensors[name].astype(np.float32) + np.float32(2**-20)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = open_model(str(folder)).load(layout)
    export(open_model(str(folder)), loaded, tmp_path / "out", None)
    kept = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(kept[name].astype(np.float32), tensor.astype(np.float32))
    dtypes = {name for name, tensor in kept.items() if tensor.dtype == np.float32}
    assert dtypes == {n for n in tensors if n in wide or n.endswith("mlp.down_proj.weight")} - {
        n for n in tensors if n.startswith("visual")
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_numbers_of_quantised_weights_are_refused(tmp_path: Path, layout: Layout, params):
    folder = tmp_path / "hf"
    export(open_model("tiny"), params, folder, "float32")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model.norm.weight holds I8 numbers, as quantised"):
        open_model(str(folder)).check_weights()


def test_what_transformers_5_writes_is_exported_as_earlier_versions_read_it(tmp_path: Path, params):
    """One file of both processors, an area by its size alone, and a list of special tokens."""
    folder, tiny = tmp_path / "five", open_model("tiny")
    shutil.copytree(TINY, folder)
    images = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    limits = images.pop("min_pixels"), images.pop("max_pixels")
    images["size"] = dict(zip(("shortest_edge", "longest_edge"), limits, strict=True))
    both = {"image_processor": images, "video_processor": images | {"fps": 2.0}}
    (folder / "processor_config.json").write_text(json.dumps(both))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    listed = tokenizer.pop("additional_special_tokens", ["<|vision_start|>"])
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(tokenizer | {"extra_special_tokens": listed}))
    export(open_model(str(folder)), params, tmp_path / "out", "float32")
    out = {p.name: p for p in (tmp_path / "out").iterdir()}
    assert "processor_config.json" not in out
    for name, more in (("preprocessor", {}), ("video_preprocessor", {"fps": 2.0})):
        written = json.loads(out[f"{name}_config.json"].read_text())
        assert written == images | more | {"min_pixels": limits[0], "max_pixels": limits[1]}
    written = json.loads(out["tokenizer_config.json"].read_text())
    assert written["additional_special_tokens"] == listed
    assert "extra_special_tokens" not in written
    again = Processor(tmp_path / "out", tiny.config)
    assert again.grid(600, 800) == Processor(folder, tiny.config).grid(600, 800)


def test_tensors_that_two_files_hold_are_refused(tmp_path: Path, params):
    folder = tmp_path / "hf"
    export(open_model("tiny"), params, folder, "float32")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    shutil.copy(folder / "model-00001-of-00001.safetensors", folder / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors and .*of-00001\.saf.* both hold the"):
        open_model(str(folder)).check_weights()
    (folder / "other.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../hf/model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names \.\./hf/model-00001.*, which is in another folder"):
        open_model(str(folder)).check_weights()


def test_a_step_of_a_run_finds_the_files_beside_it(tmp_path: Path):
    (tmp_path / "12" / PARAMS).mkdir(parents=True)
    shutil.copytree(TINY, tmp_path / "model")
    model = open_model(str(tmp_path / "12"))
    assert (model.files, model.weights) == (tmp_path / "model", tmp_path / "12")


@pytest.mark.parametrize("path", ["/nowhere/m", "./m", "~/m", "m", "a/b/c"])
def test_a_missing_folder_is_named_and_the_hub_is_not_asked(
    path: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_: pytest.fail("asked the Hub")
    )
    with pytest.raises(UserError, match=f"the model folder {path} does not exist"):
        open_model(path)


def test_a_hub_id_without_a_network_is_named(monkeypatch: pytest.MonkeyPatch):
    def offline(name: str, **_) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        UserError, match=r"Qwen/Some-VL does not exist.*Hub failed \(ConnectionError\)"
    ):
        open_model("Qwen/Some-VL")


def test_a_folder_without_a_config_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="config.json is missing"):
        open_model(str(tmp_path))


def test_a_folder_without_weights_is_named(layout: Layout):
    with pytest.raises(UserError, match="holds no .*safetensors"):
        open_model("tiny").load(layout)


def test_weights_of_another_shape_are_named(exported: Path, tmp_path: Path, layout: Layout):
    folder = tmp_path / "hf"
    shutil.copytree(exported, folder)
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] += 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has shape .* but config.json asks for"):
        open_model(str(folder)).load(layout)

"""Configs and weights: read, written back bit by bit, and refused with a sentence that says why."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from spatial_ssrl_jax.checkpoint.models import TINY, open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.qwen_vl.family import config_from_dict, config_to_dict, read_config
from spatial_ssrl_jax.qwen_vl.model import abstract_params, param_axes
from spatial_ssrl_jax.qwen_vl.weights import read_params, write_params


def read_all(folder):
    """Every tensor of a folder, in the Hub's naming."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def bits(array):
    return np.asarray(array).view(np.uint8)


def assert_same_tree(found, expected):
    flat = jax.tree_util.tree_leaves_with_path(expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, one), other in zip(flat, jax.tree.leaves(found), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert (bits(one) == bits(other)).all(), jax.tree_util.keystr(path)


def write_folder(folder, mini, params, dtype, **options):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_dict(mini.config, dtype)))
    write_params(folder, mini.config, params, dtype, **options)
    return folder


def test_tree_is_the_declared_one(mini):
    expected = abstract_params(mini.config)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), mini.params) == shapes
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    ranks = jax.tree.map(len, param_axes(mini.config), is_leaf=is_axes)
    assert ranks == jax.tree.map(lambda x: x.ndim, expected)


def test_matrices_are_stored_as_declared(mini):
    """Row h·H+i of the Hub's q_proj is column (h, i) of ours; qkv comes as q, k and v."""
    hub, text = read_all(mini.folder), mini.params["text"]
    size = mini.config.text.head_dim
    row = hub["model.layers.1.self_attn.q_proj.weight"][3 * size + 2]
    np.testing.assert_array_equal(text["layers"]["q"]["kernel"][1, :, 3, 2], row)
    column = hub["model.layers.0.self_attn.o_proj.weight"][:, 2 * size + 1]
    np.testing.assert_array_equal(text["layers"]["o"]["kernel"][0, 2, 1], column)
    vision, head = mini.config.vision, mini.config.vision.head_dim
    row = hub["visual.blocks.1.attn.qkv.weight"][vision.hidden_size + head + 5]
    np.testing.assert_array_equal(
        mini.params["vision"]["blocks"]["qkv"]["kernel"][1, :, 1, 1, 5], row
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bit_exact(mini, tmp_path, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), mini.params)
    folder = write_folder(tmp_path / "out", mini, params, dtype)
    assert_same_tree(read_params(folder, read_config(folder)), params)
    written, original = read_all(folder), read_all(mini.folder)
    assert written.keys() == original.keys()
    for name, tensor in written.items():
        expected = np.asarray(jnp.asarray(original[name]).astype(dtype))
        assert tensor.dtype == expected.dtype and (bits(tensor) == bits(expected)).all(), name


def test_written_folder_loads_in_transformers(mini, tmp_path):
    torch = pytest.importorskip("torch", reason="loads the folder in Transformers")
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder = write_folder(tmp_path / "out", mini, mini.params, "float32", shard_bytes=50_000)
    loaded, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    config = mini.config
    ids = torch.tensor([[5, config.vision_start_token_id, *[config.image_token_id] * 6, 7, 8, 9]])
    inputs = dict(
        input_ids=ids,
        mm_token_type_ids=(ids == config.image_token_id).int(),
        pixel_values=torch.randn(24, 1176, generator=torch.Generator().manual_seed(0)),
        image_grid_thw=torch.tensor([[1, 4, 6]]),
    )
    with torch.no_grad():
        expected = mini.torch_model(**inputs).logits
        found = loaded.eval()(**inputs).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_shards_and_index(mini, tmp_path):
    folder = write_folder(tmp_path / "out", mini, mini.params, "float32", shard_bytes=50_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    assert not list(folder.glob("*.partial"))
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, "np") as tensors:
            assert name in tensors.keys()  # noqa: SIM118 - not a dict
    size = sum(x.nbytes for x in read_all(folder).values())
    assert index["metadata"]["total_size"] == size
    assert_same_tree(read_params(folder, mini.config), mini.params)


def test_a_single_file_comes_before_stale_shards(mini, tmp_path):
    """A newer export beside the shards and the index of an older one, whole or in part."""
    folder = write_folder(tmp_path / "out", mini, mini.params, "float32", shard_bytes=50_000)
    newer = jax.tree.map(lambda x: x + 1, mini.params)
    write_params(folder, mini.config, newer, "float32")
    assert_same_tree(read_params(folder, mini.config), newer)
    next(folder.glob("model-00001*")).unlink()
    assert_same_tree(read_params(folder, mini.config), newer)


@pytest.mark.parametrize("shards", [1, 3])
def test_newer_names(mini, tmp_path, shards):
    """`model.language_model.` and `model.visual.`, in one file or several without an index."""
    newer = {}
    for name, tensor in read_all(mini.folder).items():
        name = (
            name.replace("model.", "model.language_model.", 1)
            if name.startswith("model.")
            else name
        )
        newer[f"model.{name}" if name.startswith("visual.") else name] = tensor
    assert sum(n.startswith("model.visual.") for n in newer) > 10
    names = sorted(newer)
    for i in range(shards):
        save_file({n: newer[n] for n in names[i::shards]}, tmp_path / f"part-{i}.safetensors")
    assert_same_tree(read_params(tmp_path, mini.config), mini.params)


def test_place_gets_each_parameter_once(mini):
    seen = {}
    params = read_params(mini.folder, mini.config, lambda path, x: seen.setdefault(path, x))
    assert len(seen) == len(jax.tree.leaves(mini.params))
    assert all(isinstance(x, np.ndarray) for x in seen.values())
    assert_same_tree(jax.tree.map(jnp.asarray, params), mini.params)


@pytest.fixture
def broken(mini, tmp_path):
    """A copy of the folder, and a function that changes its tensors."""
    shutil.copytree(mini.folder, tmp_path, dirs_exist_ok=True)

    def change(edit):
        tensors = load_file(tmp_path / "model.safetensors")
        edit(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return change


def test_missing_tensor_is_named(mini, broken):
    folder = broken(lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        read_params(folder, mini.config)


def test_extra_tensor_is_named(mini, broken):
    folder = broken(lambda t: t.update({"model.layers.2.novel": np.zeros(3, np.float32)}))
    with pytest.raises(UserError, match=r"also holds the tensor model\.layers\.2\.novel:"):
        read_params(folder, mini.config)


def test_wrongly_shaped_tensor_is_named(mini, broken):
    name = "visual.blocks.0.attn.proj.weight"
    folder = broken(lambda t: t.update({name: t[name][:, :-1].copy()}))
    with pytest.raises(
        UserError, match=r"visual\.blocks\.0\.attn\.proj\.weight has shape \(32, 31\)"
    ):
        read_params(folder, mini.config)


def test_copy_of_a_tied_head_is_taken(mini, broken):
    """Some folders store the tied head once more; an untied one is required."""

    def with_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    folder = broken(with_head)
    params = read_params(folder, mini.config)
    assert ("head" in params["text"]) != mini.config.tie_word_embeddings
    other = dataclasses.replace(mini.config, tie_word_embeddings=False)
    np.testing.assert_array_equal(
        *(read_params(folder, other)["text"][k] for k in ("head", "embed"))
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pytorch_model-00001-of-00002.bin", r"\*\.bin files, which are not read: save the model"),
        ("model_world_size_8_rank_0.pt", "verl's FSDP shards: merge them with convert from-fsdp"),
        ("x.txt", "holds no .*fetch the model's weights"),
    ],
)
def test_other_weights_are_named(mini, tmp_path, name, said):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=said):
        read_params(tmp_path, mini.config)


def test_what_is_no_model_is_named(mini, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter, not a model: merge it .* merge-lora"):
        read_config(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"name": "x", "grpo": {}, "rollout": {}}))
    with pytest.raises(UserError, match="is a run's: give the run's export/, or a step"):
        read_config(tmp_path)
    raw = config_to_dict(mini.config, "bfloat16")
    path.write_text(json.dumps(raw | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UserError, match=r"quantised model \(awq\)"):
        read_config(tmp_path)


@pytest.mark.parametrize("changed", [False, True])
def test_a_head_of_its_own_is_kept(mini, broken, changed):
    """Equal to the embedding it is dropped; else the model is untied, and exported so."""

    def with_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(changed)

    folder = broken(with_head)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    model = open_model(str(folder))
    assert model.config.tie_word_embeddings != changed
    assert ("head" in read_params(folder, model.config)["text"]) == changed
    assert config_to_dict(model.config, "float32")["tie_word_embeddings"] != changed


@pytest.mark.parametrize("keep", [4, 1000, -7])
def test_truncated_file_is_named(mini, broken, keep):
    folder = broken(lambda t: None)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        read_params(folder, mini.config)


def test_broken_index_is_named(mini, tmp_path):
    folder = write_folder(tmp_path / "out", mini, mini.params, "float32", shard_bytes=50_000)
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    next(folder.glob("model-00002-*")).unlink()
    with pytest.raises(UserError, match=r"model-00002-of-\d+\.safetensors cannot be read"):
        read_params(folder, mini.config)
    for wrong in (text[:-20], "{}"):
        index.write_text(wrong)
        with pytest.raises(UserError, match=r"index\.json"):
            read_params(folder, mini.config)


def test_folder_without_weights_is_named(mini, tmp_path):
    with pytest.raises(UserError, match=r"holds no \*\.safetensors file"):
        read_params(tmp_path, mini.config)


def test_config_of_another_size_is_refused(mini, shared):
    with pytest.raises(UserError, match=r"lacks the tensor .* does not fit its config\.json"):
        read_params(mini.folder, read_config(shared / "qwen2_5_vl" / "3b"))
    text = dataclasses.replace(mini.config.text, intermediate_size=99)
    with pytest.raises(UserError, match=r"has shape \(\d+, \d+\), but config\.json asks for"):
        read_params(mini.folder, dataclasses.replace(mini.config, text=text))


@pytest.mark.parametrize(
    "size, layers, width, kv_heads, tied, vocab",
    [("3b", 36, 2048, 2, True, 151_936), ("7b", 28, 3584, 4, False, 152_064)],
)
def test_hub_configs(shared, size, layers, width, kv_heads, tied, vocab):
    folder = shared / "qwen2_5_vl" / size
    config = read_config(folder)
    text, vision = config.text, config.vision
    assert (text.num_hidden_layers, text.hidden_size, text.vocab_size) == (layers, width, vocab)
    assert (text.num_key_value_heads, text.head_dim, text.mrope_section) == (
        kv_heads,
        128,
        (16, 24, 24),
    )
    assert (vision.head_dim, vision.window_patches, vision.patch_dim) == (80, 64, 1176)
    assert vision.fullatt_block_indexes == (7, 15, 23, 31) and vision.tokens_per_second == 2
    assert config.tie_word_embeddings == tied
    assert config.vision_tokens == (151_652, 151_653, 151_655, 151_656)
    hub = json.loads((folder / "config.json").read_text())
    ours = config_to_dict(config, "bfloat16")
    different = {"max_window_layers", "vision_token_id", "vision_config", "tie_word_embeddings"}
    for key in hub.keys() - different:
        assert ours[key] == hub[key], key
    for key, value in hub["vision_config"].items():
        assert ours["vision_config"][key] == value, key


def test_config_round_trip(mini):
    written = json.loads(json.dumps(config_to_dict(mini.config, "float32")))
    assert config_from_dict(written, "again") == mini.config
    assert mini.config.text.rope_theta == 5e4 and mini.config.text.rms_norm_eps == 1e-5


def test_config_errors(shared, tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match=r"config\.json is missing"):
        read_config(tmp_path)
    path.write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        read_config(tmp_path)
    path.write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(UserError, match=r"config\.json has the model_type .qwen2_vl.; expected"):
        read_config(tmp_path)
    path.write_text("[]")
    with pytest.raises(UserError, match=r"config\.json has no model_type"):
        read_config(tmp_path)
    raw = json.loads((shared / "qwen2_5_vl" / "3b" / "config.json").read_text())
    yarn = {"rope_type": "default", "type": "yarn", "factor": 4.0}  # as Qwen's pages add it
    for other in (
        {"hidden_act": "gelu"},
        {"rope_scaling": {"type": "yarn"}},
        {"rope_scaling": yarn},
    ):
        path.write_text(json.dumps(raw | other))
        with pytest.raises(UserError, match=r"config\.json sets .* which is not supported"):
            read_config(tmp_path)
    del raw["vision_config"]
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"config\.json lacks the key 'vision_config'"):
        read_config(tmp_path)


@pytest.mark.parametrize("release", ["4.49.0", "4.50.3", "4.52.4", "4.57.3"])
def test_each_release_writes_the_same_config(shared, release: str):
    """4.49 writes only what differs from its class's defaults."""
    folder = shared / "field" / "model_configs" / f"transformers_{release}_3b"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    assert read_config(folder) == read_config(shared / "qwen2_5_vl" / "3b")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("hidden_size", "64", r'\(hidden_size is "64", expected a whole number, at least 1'),
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000, .* at most 1,024"),
        ("vision_config.depth", None, None),
        ("vision_config.depth", [1], r"\(vision_config\.depth is \[1\]"),
        ("vision_config.patch_size", 10**6, r"\(vision_config\.patch_size is 1000000"),
        ("vision_config.in_chans", 1, "sets vision_config.in_channels to 1, which is not"),
        ("vision_config.window_size", 14, "window_size is smaller than a merged patch"),
        ("rope_scaling.mrope_section", [1, 2], "expected a list of 3"),
        ("rope_scaling.mrope_section", [1, 2, 3], "contradicts itself .mrope_section is not half"),
        ("num_attention_heads", 7, "num_attention_heads does not divide hidden_size"),
        ("vision_config.out_hidden_size", 4, "out_hidden_size is not hidden_size"),
        ("rms_norm_eps", float("nan"), r"\(rms_norm_eps is NaN, expected a number"),
        ("tie_word_embeddings", "yes", "expected true or false"),
        ("eos_token_id", None, None),
        ("eos_token_id", [], None),
        ("eos_token_id", [792, 1], None),
        ("eos_token_id", "", r'\(eos_token_id is "", expected a whole number'),
        ("image_token_id", 798, "image_token_id is 798, .* below 798"),
        ("model_type", {}, r"has the model_type \{\}; expected"),
    ],
)
def test_a_wrong_value_in_the_config_is_named(tmp_path, path: str, value, message: str | None):
    """Without a message the value counts as missing, and its default stands in."""
    raw = json.loads((TINY / "config.json").read_text())
    raw["vocab_size"], node = 798 if message else 152_064, raw
    *sections, key = path.split(".")
    for section in sections:
        node = node[section]
    node[key] = value
    (tmp_path / "config.json").write_text(json.dumps(raw))
    if message is None:
        assert read_config(tmp_path).eos_token_id in (792, 151_645)
        return
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "holds no JSON object"),
        ({"weight_map": []}, "expected an object"),
        ({"weight_map": {"a": 1}}, r"\(weight_map\.a is 1, expected text"),
        ({"weight_map": {"a": "a\0b"}}, "cannot be read .it is not there"),
        ({"weight_map": {"a": "gone"}}, "cannot be read .it is not there"),
        ({"weight_map": {"a": "../gone"}}, "which is in another folder"),
    ],
)
def test_a_wrong_value_in_the_index_is_named(mini, tmp_path, index, message: str):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        read_params(tmp_path, mini.config)

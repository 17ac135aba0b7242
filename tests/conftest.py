"""What all tests share: one compilation cache a session, the shared folder, and a toy model."""

import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils.epath import backend

from spatial_ssrl_jax.checkpoint.export import copy_files
from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.common.errors import run_command
from spatial_ssrl_jax.data.processor import Prompt
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig, TextConfig
from spatial_ssrl_jax.qwen_vl.family import config_to_dict
from spatial_ssrl_jax.qwen_vl.inputs import Grid, merged_tokens
from spatial_ssrl_jax.qwen_vl.model import Params, abstract_params
from spatial_ssrl_jax.qwen_vl.qwen2_5 import (
    MODEL_TYPE,
    Qwen2_5VisionConfig,
    lay_out_patches,
    mrope_positions,
)
from tests.helpers.fake_storage import Storage

pytest_plugins = ["tests.helpers.toy_runs"]

ROOT = Path(__file__).resolve().parents[1]
# Files of tests that take minutes: first, so that no process is left alone with one at the end.
LONG = ("tests/trainer/test_kills", "tests/trainer/", "tests/rl/")

# A shell lets what it runs in the background ignore Ctrl-C, and so would the commands started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Two layers each: grouped heads in the language model, a windowed and a full block in the tower.
SMALL_TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    mrope_section=(1, 1, 2),
)
SMALL_VISION = dict(
    depth=2,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    out_hidden_size=32,
    fullatt_block_indexes=(1,),
)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # of pytest-xdist
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: [not item.nodeid.startswith(name) for name in LONG])


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Each program is compiled once a session, in child processes too."""
    folder = tmp_path_factory.mktemp("jax-cache")
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        yield folder


@pytest.fixture(autouse=True, scope="module")
def programs_are_let_go() -> Iterator[None]:
    """Programs of one file are freed before the next: each takes dozens of memory mappings, of
    which Linux allows a process 65,530, and XLA crashes when there is none left."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def storage() -> Iterator[Storage]:
    """A cloud with one bucket, `gs://bucket`, for this process and its children."""
    pytest.importorskip("gcsfs", reason="gcsfs is missing: pip install -e '.[gcs]'")
    storage = Storage("bucket")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in storage.environment.items():
            patch.setenv(name, value)
        yield storage
    # epath and fsspec keep what they connected to.
    type(backend.fsspec_backend)._get_filesystem.cache_clear()
    fsspec.get_filesystem_class("gcs").clear_instance_cache()
    storage.close()


@pytest.fixture
def bucket(storage: Storage) -> Iterator[Storage]:
    """The cloud with nothing in its bucket and nothing refused."""
    yield storage
    storage.buckets["bucket"].clear()
    storage.denied.clear()
    storage.faults.clear()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real tokenizers and configs that is beside the repository."""
    for folder in (ROOT.parent / "shared", ROOT / "shared"):
        if (folder / "qwen2_5_vl").is_dir():
            return folder
    pytest.skip(f"{ROOT.parent / 'shared'} is missing: it holds the real tokenizer and configs.")


@dataclasses.dataclass(frozen=True)
class Toy:
    """A model of a few thousand parameters with a vocabulary of its own, and prompts for it.

    Attributes:
      config: two text layers with grouped heads, a windowed and a full vision block, untied head.
      params: float32 weights, large enough that every part shows in the output.
    """

    config: QwenVLConfig
    params: Params

    def prompt(self, seed: int, text: int, grids: Sequence[Grid] = ()) -> Prompt:
        """Random text tokens with random images of the given patch grids in the middle."""
        rng, config = np.random.default_rng(seed), self.config
        counts = [merged_tokens(config.vision, grid) for grid in grids]
        pieces = [rng.integers(0, 600, text // 2)]
        for count in counts:
            pieces += [[config.vision_start_token_id], np.full(count, config.image_token_id)]
            pieces += [[config.vision_end_token_id]]
        ids = np.concatenate([*pieces, rng.integers(0, 600, text - text // 2)]).astype(np.int32)
        layout = lay_out_patches(config.vision, list(grids))
        is_vision = ids == config.image_token_id
        position = mrope_positions(config.vision, is_vision, list(grids), [None] * len(grids))
        index = np.full(len(ids), -1, np.int32)
        index[is_vision] = layout.merged
        pixels = rng.integers(0, 256, (len(layout.source), config.vision.patch_dim), np.uint8)
        return Prompt(
            ids=ids,
            position=position,
            next_position=int(position.max()) + 1,
            image_index=index,
            patches=pixels,
            frame=layout.frame,
            coords=layout.coords,
        )


@pytest.fixture(scope="session")
def toy() -> Toy:
    config = QwenVLConfig(
        model_type=MODEL_TYPE,
        text=TextConfig(
            **SMALL_TEXT
            | dict(vocab_size=700, hidden_size=48, intermediate_size=64, mrope_section=(2, 2, 2))
        ),
        vision=Qwen2_5VisionConfig(**SMALL_VISION | dict(out_hidden_size=48)),
        tie_word_embeddings=False,
        image_token_id=690,
        video_token_id=691,
        vision_start_token_id=692,
        vision_end_token_id=693,
        bos_token_id=694,
        eos_token_id=695,
    )
    return Toy(config, random_params(config, seed=4))


def random_params(config: QwenVLConfig, seed: int) -> Params:
    """Five times the usual matrices, random biases and norm scales: else wrong code goes unseen."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        spread = 0.2 if path[-1].key in ("bias", "scale") else 0.1
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(mean + spread * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


@pytest.fixture(scope="session")
def measure() -> Callable[..., float]:
    """Prints and returns max|ours - reference| / max|reference|; `pytest -rP` shows the metrics."""

    def compare(name: str, ours, reference) -> float:
        ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
        assert ours.shape == reference.shape
        value = float(np.abs(ours - reference).max() / np.abs(reference).max())
        print(f"measured {name}: {value:.1e}")
        return value

    return compare


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder with a smaller config."""
    folder = tmp_path_factory.mktemp("toy")
    tiny = open_model("tiny")
    copy_files(tiny, folder)
    config = dataclasses.replace(
        tiny.config,
        text=dataclasses.replace(tiny.config.text, **SMALL_TEXT),
        vision=dataclasses.replace(tiny.config.vision, **SMALL_VISION),
    )
    (folder / "config.json").write_text(json.dumps(config_to_dict(config, "float32")))
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Runs a command as its `__main__` does; gives exit code, stdout and stderr."""

    def call(main: Callable, *argv) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
        with pytest.raises(SystemExit) as exited:
            run_command(main)
        return exited.value.code, *capsys.readouterr()

    return call

"""A small random checkpoint to ask, and small files of all fourteen benchmarks."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from spatial_ssrl_jax import evaluate
from spatial_ssrl_jax.checkpoint.export import export
from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.eval.predictions import read_predictions
from spatial_ssrl_jax.eval.questions import Prediction
from tests.conftest import SMALL_TEXT, SMALL_VISION, random_params
from tests.helpers import benchmark_files as files


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy with the shipped tokenizer, whose answers depend on every part of a prompt.

    Weights as they are usually drawn would look at the last token alone, the same in all prompts.
    """
    tiny = open_model("tiny")
    config = dataclasses.replace(
        tiny.config,
        text=dataclasses.replace(tiny.config.text, **SMALL_TEXT),
        vision=dataclasses.replace(tiny.config.vision, **SMALL_VISION),
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("checkpoint") / "toy"
    toy = dataclasses.replace(tiny, config=config)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: 3 * x if path[-1].key == "kernel" else x, random_params(config, seed=3)
    )
    export(toy, params, folder, "float32")
    return folder


def write_clip(path: Path, frames: int = 12, size: tuple[int, int] = (60, 80)) -> None:
    """An mp4 of three seconds whose image moves."""
    av = pytest.importorskip("av", reason="writes and reads videos, which needs PyAV")
    path.unlink(missing_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=frames // 3)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(noise, 5 * i, axis=1), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@pytest.fixture(scope="session")
def fourteen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds one folder a benchmark."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for name, write in files.WRITERS.items():
        (folder / name).mkdir()
        write(folder / name)
    write_clip(folder / "vsi_bench" / "rooms" / "1.mp4")
    return folder


@pytest.fixture
def score(run: Callable) -> Callable:
    """Runs `evaluate`; gives exit code, stdout and stderr."""
    return partial(run, evaluate.main)


@pytest.fixture
def scored(score: Callable) -> Callable[..., tuple[list[Prediction], str]]:
    """Scores files; gives the predictions that are written into a folder, and what is said."""

    def call(out: Path, *argv) -> tuple[list[Prediction], str]:
        code, _, said = score("--score", *argv, f"--out={out}")
        assert code == 0, said
        return read_predictions(out / "predictions.jsonl"), said

    return call

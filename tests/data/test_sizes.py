"""Prompts of 200 random image sizes, from 1:180 to 180:1, against Transformers' own code."""

import math
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from spatial_ssrl_jax.data.processor import ImageArea, Processor
from spatial_ssrl_jax.data.videos import Video
from spatial_ssrl_jax.qwen_vl.family import read_config
from spatial_ssrl_jax.qwen_vl.pixels import normalize_patches
from tests.conftest import ROOT

LEAST, MOST = 6 * 28 * 28, 60 * 28 * 28


def random_sizes() -> list[tuple[int, int]]:
    """Heights and widths, spread on a log scale; some smaller and some larger than allowed."""
    rng, found = np.random.default_rng(0), []
    while len(found) < 200:
        aspect = 180 ** rng.uniform(-1, 1)
        area = np.exp(rng.uniform(np.log(LEAST / 4), np.log(MOST * 4)))
        height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if min(height, width) and max(height, width) <= 180 * min(height, width):
            found.append((height, width))
    return found


SIZES = random_sizes()


@pytest.fixture(scope="module")
def folder(shared) -> Path:
    return shared / "qwen2_5_vl"


@pytest.fixture(scope="module")
def processor(folder) -> Processor:
    return Processor(folder, read_config(folder / "3b"), LEAST, MOST)


def test_sizes_are_spread():
    aspects = np.array([h / w for h, w in SIZES])
    areas = np.array([h * w for h, w in SIZES])
    assert aspects.min() < 1 / 100 and aspects.max() > 100
    assert (areas < LEAST).sum() > 20 and (areas > MOST).sum() > 20


def test_resizing_order_and_expansion(folder, processor):
    """Each place holds the reference's patch of that row and column."""
    reference = Qwen2VLImageProcessorPil.from_pretrained(folder, min_pixels=LEAST, max_pixels=MOST)
    token = processor.config.image_token_id
    for seed, (height, width) in enumerate(SIZES):
        image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        prompt = processor.prompt("Where?", (image,))
        out = reference(images=[image], return_tensors="np", input_data_format="channels_last")
        _, high, wide = out["image_grid_thw"][0].tolist()
        assert processor.grid(height, width) == (1, high, wide)
        assert (prompt.ids == token).sum() == high * wide // 4
        row, column = np.moveaxis(prompt.coords, -1, 0)
        listed = (row // 2 * (wide // 2) + column // 2) * 4 + row % 2 * 2 + column % 2
        assert len(prompt.frame) == high * wide and (prompt.frame == 0).all()
        found = normalize_patches(jnp.asarray(prompt.patches), processor.config.vision)
        np.testing.assert_array_equal(found, out["pixel_values"][listed])
        quads = listed.reshape(-1, 4)[prompt.image_index[prompt.ids == token]]
        np.testing.assert_array_equal(quads.ravel(), np.arange(high * wide))


NAMED = [
    (240, 240), (511, 511), (512, 512), (480, 640), (640, 480), (768, 1024), (1064, 1600),
    (2000, 3000), (28, 28),
]  # fmt: skip


def by_area(image: Image.Image, least: int, most: int) -> Image.Image:
    """The resizing of EasyR1 and LLaMA-Factory, on an image by itself."""
    if image.width * image.height > most:
        factor = math.sqrt(most / (image.width * image.height))
        image = image.resize((int(image.width * factor), int(image.height * factor)))
    if image.width * image.height < least:
        factor = math.sqrt(least / (image.width * image.height))
        image = image.resize((int(image.width * factor), int(image.height * factor)))
    return image


@pytest.mark.parametrize("limits", [(262_144, 4_194_304), (1, 262_144)])
def test_training_resizes_by_area_first(folder, limits: tuple[int, int]):
    """As the released trainers, whatever the size: then with the model's own limits, to 28s."""
    processor = Processor(folder, read_config(folder / "3b"), area=ImageArea(*limits))
    reference = Qwen2VLImageProcessorPil.from_pretrained(folder)
    rng = np.random.default_rng(0)
    spread = [(round(900 / a), round(900 * a)) for a in 4 ** rng.uniform(-1, 1, 200)]
    scales = np.exp(rng.uniform(np.log(0.05), np.log(2.0), 200))
    random = [(round(h * s), round(w * s)) for (h, w), s in zip(spread, scales, strict=True)]
    for number, (height, width) in enumerate(NAMED + random):
        image = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        resized = by_area(Image.fromarray(image), *limits)
        patches, grid = processor.patches(image)
        out = reference(images=[resized], return_tensors="np")
        assert (
            list(grid) == out["image_grid_thw"][0].tolist() == list(processor.grid(height, width))
        )
        if number < 30:
            found = normalize_patches(jnp.asarray(patches), processor.config.vision)
            np.testing.assert_array_equal(found, out["pixel_values"])


def test_hand_worked_sizes(folder):
    grpo, cold_start = (
        Processor(folder, read_config(folder / "3b"), area=ImageArea(*limits))
        for limits in ((262_144, 4_194_304), (1, 262_144))
    )
    assert grpo.grid(240, 240) == (1, 36, 36)  # 512, then 504 pixels a side
    assert cold_start.grid(480, 640) == (1, 448 // 14, 588 // 14)


def test_positions(processor):
    """Position ids, and where the response continues (the reference's rope delta)."""
    torch = pytest.importorskip("torch", reason="the reference's positions need torch")
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    with torch.device("meta"):
        model = Qwen2_5_VLModel(Qwen2_5_VLConfig())
    for seed, pair in enumerate(zip(SIZES[::2], SIZES[1::2], strict=True)):
        rng = np.random.default_rng(seed)
        images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in pair]
        prompt = processor.prompt("From <image> to <image>!", images)
        ids = torch.tensor(prompt.ids[None], dtype=torch.long)
        expected, delta = model.get_rope_index(
            ids,
            (ids == processor.config.image_token_id).int(),
            image_grid_thw=torch.tensor([processor.grid(*size) for size in pair]),
        )
        np.testing.assert_array_equal(prompt.position, expected[:, 0])
        assert prompt.next_position == len(prompt.ids) + int(delta)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["torchvision"] = None
from pathlib import Path
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.qwen_vl.family import read_config
from tests.data.test_sizes import image_and_video
folder = Path(sys.argv[1])
print(image_and_video(Processor(folder, read_config(folder / "3b"))))
"""


def image_and_video(processor: Processor) -> str:
    """A prompt's ids and the sum of its patches, as text."""
    rng = np.random.default_rng(0)
    video = Video(rng.integers(0, 256, (3, 56, 56, 3), np.uint8), 2.0)
    prompt = processor.prompt("?", (rng.integers(0, 256, (70, 90, 3), np.uint8),), (video,))
    return f"{prompt.ids.tolist()} {prompt.patches.sum()}"


def test_torch_is_not_needed(folder):
    command = [sys.executable, "-c", WITHOUT_TORCH, str(folder)]
    root = ROOT
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    expected = image_and_video(Processor(folder, read_config(folder / "3b")))
    assert done.stdout.strip() == expected

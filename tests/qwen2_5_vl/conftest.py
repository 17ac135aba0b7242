"""Random checkpoints that Transformers writes, at real head sizes, to hold our model against."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from spatial_ssrl_jax.data.prompts import Processor, Prompt
from spatial_ssrl_jax.qwen2_5_vl.config import Qwen2_5_VLConfig, read_config
from spatial_ssrl_jax.qwen2_5_vl.model import Params
from spatial_ssrl_jax.qwen2_5_vl.weights import read_params

NO_TORCH = "compares with Transformers, which needs torch: pip install torch"
VISION_80 = dict(depth=4, hidden_size=160, intermediate_size=224, num_heads=2)  # heads of 80
SHAPES = {
    # Heads of 128 with the hub's M-RoPE sections, embedding tied as in the 3B.
    "tied": dict(
        text=dict(hidden_size=256, num_attention_heads=2, num_key_value_heads=1),
        section=(16, 24, 24),
        vision=VISION_80,
        tied=True,
        vocab=151_936,
        theta=1e6,
    ),
    # Seven query heads a key/value head and a head of its own, as in the 7B.
    "grouped": dict(
        text=dict(hidden_size=224, num_attention_heads=14, num_key_value_heads=2),
        section=(2, 3, 3),
        vision=dict(depth=5, hidden_size=64, intermediate_size=96, num_heads=4),
        tied=False,
        vocab=152_064,
        theta=1e6,
    ),
}
MINI = dict(
    text=dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2),
    section=(1, 2, 1),
    vision=dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2),
    vocab=1000,
    theta=5e4,
    eps=1e-5,
)
SPECIAL = ("bos", "eos", "vision_start", "vision_end", "vision", "image", "video")


@dataclass(frozen=True)
class Checkpoint:
    """One folder as both sides have it.

    Attributes:
      folder: config, weights, tokenizer and picture settings.
      torch_model: Transformers' model.
      config, params: what we read from the folder.
    """

    folder: Path
    torch_model: Any
    config: Qwen2_5_VLConfig
    params: Params


def make_checkpoint(folder: Path, shape: dict, seed: int) -> Checkpoint:
    """Writes random weights with Transformers; token ids are the hub's where the vocabulary is."""
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    transformers = pytest.importorskip("transformers")
    first = 151_643 if shape["vocab"] > 151_700 else 980
    token = dict(zip(SPECIAL, (first, first + 2, *range(first + 9, first + 14)), strict=True))
    rope = dict(rope_type="default", mrope_section=shape["section"], rope_theta=shape["theta"])
    depth = shape["vision"]["depth"]
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=shape["vocab"],
            intermediate_size=160,
            num_hidden_layers=2,
            rms_norm_eps=shape.get("eps", 1e-6),
            rope_parameters=rope,
            max_position_embeddings=128_000,
            bos_token_id=token["bos"],
            eos_token_id=token["eos"],
            pad_token_id=token["bos"],
            **shape["text"],
        ),
        vision_config=dict(
            out_hidden_size=shape["text"]["hidden_size"],
            fullatt_block_indexes=[min(3, depth - 1)],
            tokens_per_second=2,
            **shape["vision"],
        ),
        tie_word_embeddings=shape["tied"],
        image_token_id=token["image"],
        video_token_id=token["video"],
        vision_start_token_id=token["vision_start"],
        vision_end_token_id=token["vision_end"],
    )
    torch.manual_seed(seed)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
            else:  # biases are zero and norms one at first: then wrong code passes
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = token["bos"]
    model.save_pretrained(folder)
    ours = read_config(folder)
    return Checkpoint(folder, model, ours, read_params(folder, ours))


@pytest.fixture(scope="session", params=SHAPES)
def checkpoint(request, shared: Path, tmp_path_factory) -> Checkpoint:
    """A model with the real vocabulary, tokenizer and picture settings."""
    folder = tmp_path_factory.mktemp(request.param)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.json"):
        shutil.copy(shared / "qwen2_5_vl" / name, folder)
    shutil.copy(shared / "qwen2_5_vl" / "preprocessor_config.json", folder)
    return make_checkpoint(folder, SHAPES[request.param], seed=0)


@pytest.fixture(scope="session", params=["tied", "untied"])
def mini(request, tmp_path_factory) -> Checkpoint:
    """A very small model without a tokenizer, for tests of files."""
    folder = tmp_path_factory.mktemp(f"mini-{request.param}")
    return make_checkpoint(folder, {**MINI, "tied": request.param == "tied"}, seed=1)


# Pictures as (height, width); pixels are random. Each prompt is one question.
PROMPTS = {
    "one": ((196, 252),),
    "five": ((28, 28), (56, 140), (112, 112), (140, 84), (252, 196)),
    "dot": ((28, 28),),
    "strip": ((28, 700),),
    "ragged": ((364, 252),),
    "none": (),
}


@dataclass(frozen=True)
class Question:
    """A prompt of ours, and the same for Transformers, built without our code.

    Attributes:
      prompt: from our processor.
      inputs: Transformers' tensors: ids, picture patches, grids and token types.
    """

    prompt: Prompt
    inputs: dict[str, Any]

    def followed_by(self, response: np.ndarray) -> dict[str, Any]:
        """Transformers' inputs with a response behind the prompt."""
        import torch

        more = torch.tensor(np.asarray(response)[None], dtype=torch.long)
        ids = torch.cat((self.inputs["input_ids"], more), dim=1)
        types = torch.cat((self.inputs["mm_token_type_ids"], torch.zeros_like(more)), dim=1)
        return {**self.inputs, "input_ids": ids, "mm_token_type_ids": types}


def random_pictures(sizes, seed: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return tuple(rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes)


def ask_reference(folder: Path, checkpoint: Checkpoint, text: str, pictures) -> dict[str, Any]:
    """What Transformers' processor does, whose class cannot be made without torchvision."""
    import torch
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(folder, min_pixels=28 * 28)
    inputs = {}
    chat = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{text}"
    chat += "<|im_end|>\n<|im_start|>assistant\n"
    if pictures:
        inputs = dict(processor(images=list(pictures), return_tensors="pt"))
    for grid in inputs.get("image_grid_thw", ()):
        chat = chat.replace("<|image_pad|>", "<|mark|>" * (int(grid.prod()) // 4), 1)
    chat = chat.replace("<|mark|>", "<|image_pad|>")
    ids = AutoTokenizer.from_pretrained(folder)(chat, return_tensors="pt")["input_ids"]
    types = (ids == checkpoint.config.image_token_id).to(torch.int32)
    return {**inputs, "input_ids": ids, "mm_token_type_ids": types}


@pytest.fixture(scope="session")
def questions(checkpoint: Checkpoint) -> dict[str, Question]:
    """Every prompt of `PROMPTS` from both sides."""
    processor = Processor(checkpoint.folder, checkpoint.config, min_pixels=28 * 28)
    found = {}
    for seed, (name, sizes) in enumerate(PROMPTS.items()):
        pictures = random_pictures(sizes, seed)
        text = f"What changed, {name}? Answer in words."
        marks = "<|vision_start|><|image_pad|><|vision_end|>" * len(sizes)
        inputs = ask_reference(checkpoint.folder, checkpoint, marks + text, pictures)
        found[name] = Question(processor.prompt(text, pictures), inputs)
    return found


@pytest.fixture(scope="session")
def as_numpy() -> Callable[[Any], np.ndarray]:
    return lambda tensor: np.asarray(jax.device_get(tensor.detach().numpy()))

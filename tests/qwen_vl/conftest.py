"""Random checkpoints that Transformers writes, at real head sizes, to compare our model with."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from spatial_ssrl_jax.data.processor import Processor, Prompt
from spatial_ssrl_jax.data.videos import Video
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.family import read_config
from spatial_ssrl_jax.qwen_vl.model import Params
from spatial_ssrl_jax.qwen_vl.weights import read_params

NO_TORCH = "compares with Transformers, which needs torch: pip install torch"
VISION_80 = dict(depth=4, hidden_size=160, intermediate_size=224, num_heads=2)  # heads of 80
SHAPES = {
    # Heads of 128 with the Hub's M-RoPE sections, embedding tied as in the 3B.
    "tied": dict(
        text=dict(hidden_size=256, num_attention_heads=2, num_key_value_heads=1),
        section=(16, 24, 24),
        vision=VISION_80,
        tied=True,
        vocab=151_936,
        theta=1e6,
    ),
    # Seven query heads a key/value head and an untied head, as in the 7B.
    "grouped": dict(
        text=dict(hidden_size=896, num_attention_heads=7, num_key_value_heads=1),
        section=(16, 24, 24),
        vision=dict(VISION_80, depth=5),
        tied=False,
        vocab=152_064,
        theta=1e6,
    ),
    # The 3B's own widths, with two of its text layers and four vision blocks.
    "wide": dict(
        text=dict(
            hidden_size=2048,
            num_attention_heads=16,
            num_key_value_heads=2,
            intermediate_size=11_008,
        ),
        section=(16, 24, 24),
        vision=dict(depth=4, hidden_size=1280, intermediate_size=3420, num_heads=16),
        tied=True,
        vocab=151_936,
        theta=1e6,
        scale=2,  # wide sums are large already; with more, rounding errors reach the limit
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
    """One folder, as Transformers and as our code reads it.

    Attributes:
      folder: config, weights, tokenizer and image settings.
      torch_model: Transformers' model.
      config, params: what we read from the folder.
    """

    folder: Path
    torch_model: Any
    config: QwenVLConfig
    params: Params


def make_checkpoint(folder: Path, shape: dict, seed: int) -> Checkpoint:
    """Writes random weights with Transformers; token ids are the Hub's where the vocabulary is."""
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    transformers = pytest.importorskip("transformers")
    first = 151_643 if shape["vocab"] > 151_700 else 980
    token = dict(zip(SPECIAL, (first, first + 2, *range(first + 9, first + 14)), strict=True))
    rope = dict(rope_type="default", mrope_section=shape["section"], rope_theta=shape["theta"])
    depth = shape["vision"]["depth"]
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=shape["vocab"],
            num_hidden_layers=2,
            rms_norm_eps=shape.get("eps", 1e-6),
            rope_parameters=rope,
            max_position_embeddings=128_000,
            bos_token_id=token["bos"],
            eos_token_id=token["eos"],
            pad_token_id=token["bos"],
            **{"intermediate_size": 160, **shape["text"]},
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
                parameter.mul_(shape.get("scale", 5))
            else:  # biases are zero and norms one at first: then wrong code passes
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = token["bos"]
    model.save_pretrained(folder)
    ours = read_config(folder)
    return Checkpoint(folder, model, ours, read_params(folder, ours))


@pytest.fixture(scope="session", params=["tied", "grouped", "wide"])
def checkpoint(request, shared: Path, tmp_path_factory) -> Checkpoint:
    """A model with the real vocabulary, tokenizer and image settings."""
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


@dataclass(frozen=True)
class PromptMedia:
    """The media of one prompt: images as (height, width), videos as (frames, height, width, fps).

    Pixels are random. All sides are multiples of 28, so that nothing is resized.
    """

    images: tuple[tuple[int, int], ...] = ()
    videos: tuple[tuple[int, int, int, float], ...] = ()
    kinds: tuple[str, ...] = ()

    @property
    def order(self) -> tuple[str, ...]:
        """The kind of each medium, in prompt order."""
        return self.kinds or ("image",) * len(self.images) + ("video",) * len(self.videos)


PROMPTS = {
    "one": PromptMedia(((196, 252),)),
    "five": PromptMedia(((28, 28), (56, 140), (112, 112), (140, 84), (252, 196))),
    "dot": PromptMedia(((28, 28),)),
    "strip": PromptMedia(((28, 700),)),
    "ragged": PromptMedia(((364, 252),)),
    "none": PromptMedia(),
    "mixed": PromptMedia(((56, 84), (28, 28)), ((7, 84, 112, 2.0),), ("image", "video", "image")),
    **{
        f"video of {frames} at {fps}": PromptMedia((), ((frames, *size, fps),))
        for frames, size in ((4, (112, 168)), (7, (140, 84)), (16, (56, 56)))
        for fps in (1, 2)
    },
}


@dataclass(frozen=True)
class Question:
    """A prompt from our processor, and the same for Transformers, built without our code.

    Attributes:
      prompt: from our processor.
      inputs: Transformers' tensors: ids, patches, grids, token types and seconds.
      patches: the patches of all images and videos in the order that they are in the text.
      grids: their grids [n, 3].
    """

    prompt: Prompt
    inputs: dict[str, Any]
    patches: Any
    grids: Any

    def followed_by(self, response: np.ndarray) -> dict[str, Any]:
        """Transformers' inputs with a response after the prompt."""
        import torch

        more = torch.tensor(np.asarray(response)[None], dtype=torch.long)
        ids = torch.cat((self.inputs["input_ids"], more), dim=1)
        types = torch.cat((self.inputs["mm_token_type_ids"], torch.zeros_like(more)), dim=1)
        return {**self.inputs, "input_ids": ids, "mm_token_type_ids": types}


def patches_by_hand(frames: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Patches and grid of a video [F, H, W, 3], whose own processor needs torchvision."""
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = (frames / 255 - mean) / std
    if len(pixels) % 2:
        pixels = np.concatenate((pixels, pixels[-1:]))
    count, height, width, _ = pixels.shape
    patches = [
        pixels[f : f + 2, y + i : y + i + 14, x + j : x + j + 14].transpose(3, 0, 1, 2).ravel()
        for f in range(0, count, 2)
        for y in range(0, height, 28)
        for x in range(0, width, 28)
        for i in (0, 14)
        for j in (0, 14)
    ]
    return np.array(patches, np.float32), [count // 2, height // 14, width // 14]


def reference_inputs(
    checkpoint: Checkpoint,
    text: str,
    media: PromptMedia,
    images: list[np.ndarray],
    videos: list[Video],
) -> dict[str, Any]:
    """What Transformers' processor computes, whose class cannot be made without torchvision.

    Returns:
      The fields of `Question` but for `prompt`.
    """
    import torch
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint.folder, min_pixels=28 * 28)
    patched = {"image": [], "video": []}
    for image in images:
        out = processor(images=[image], return_tensors="np")
        patched["image"].append((out["pixel_values"], out["image_grid_thw"][0].tolist()))
    patched["video"] = [patches_by_hand(video.frames) for video in videos]

    def concatenated(items: list) -> tuple:
        patches = torch.tensor(np.concatenate([patches for patches, _ in items]))
        return patches, torch.tensor([grid for _, grid in items])

    inputs, left = {}, {kind: iter(items) for kind, items in patched.items()}
    if images:
        inputs["pixel_values"], inputs["image_grid_thw"] = concatenated(patched["image"])
    if videos:
        inputs["pixel_values_videos"], inputs["video_grid_thw"] = concatenated(patched["video"])
        inputs["second_per_grid_ts"] = torch.tensor([2 / video.fps for video in videos])
    items = [next(left[kind]) for kind in media.order]
    marks = "".join(
        f"<|vision_start|>{f'<|{kind}_pad|>' * (int(np.prod(grid)) // 4)}<|vision_end|>"
        for kind, (_, grid) in zip(media.order, items, strict=True)
    )
    chat = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{marks}"
    chat += f"{text}<|im_end|>\n<|im_start|>assistant\n"
    ids = AutoTokenizer.from_pretrained(checkpoint.folder)(chat, return_tensors="pt")["input_ids"]
    config = checkpoint.config
    types = (ids == config.image_token_id) + 2 * (ids == config.video_token_id)
    inputs |= {"input_ids": ids, "mm_token_type_ids": types.to(torch.int32)}
    patches, grids = concatenated(items) if items else (None, None)
    return dict(inputs=inputs, patches=patches, grids=grids)


@pytest.fixture(scope="session")
def questions(checkpoint: Checkpoint) -> dict[str, Question]:
    """Every prompt of `PROMPTS` from both sides."""
    processor = Processor(checkpoint.folder, checkpoint.config, min_pixels=28 * 28)
    found = {}
    for seed, (name, media) in enumerate(PROMPTS.items()):
        rng = np.random.default_rng(seed)
        images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in media.images]
        videos = [
            Video(rng.integers(0, 256, (*size, 3), np.uint8), fps) for *size, fps in media.videos
        ]
        text = f"What changed, {name}? Answer in words."
        marks = "".join(f"<{kind}>" for kind in media.kinds)
        reference = reference_inputs(checkpoint, text, media, images, videos)
        found[name] = Question(processor.prompt(marks + text, images, videos), **reference)
    return found


@pytest.fixture(scope="session")
def as_numpy() -> Callable[[Any], np.ndarray]:
    return lambda tensor: np.asarray(jax.device_get(tensor.detach().numpy()))

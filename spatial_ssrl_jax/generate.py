"""Answers: python -m spatial_ssrl_jax.generate --model=DIR --image=F --video=F --question=TEXT"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.common.errors import BadImage, UserError, run_command
from spatial_ssrl_jax.config.schema import MeshSettings
from spatial_ssrl_jax.data.batching import pad_prompts
from spatial_ssrl_jax.data.images import open_image
from spatial_ssrl_jax.data.processor import Processor, Prompt
from spatial_ssrl_jax.data.videos import FPS, MAX_FRAMES, open_video
from spatial_ssrl_jax.inference.options import (
    add_inference_options,
    check_inference_options,
    default_dtype,
)
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.kernels import choose_decode_kernel
from spatial_ssrl_jax.rollout.engine import Engine, Rollout
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT

_CHECK_EVERY = 8
_PROMPT_STEP, _WINDOW_STEP = 128, 8


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    model = open_model(args.model)
    processor = Processor(model.files, model.config, args.min_pixels, args.max_pixels)
    prompt = _prompt(processor, args)
    layout = Layout(make_mesh(MeshSettings(data=1, fsdp=1, tensor=-1)))
    dtype = default_dtype(args.dtype)
    params = model.load(layout, dtype)
    limit = _round_up(args.max_new_tokens, _CHECK_EVERY)
    decode_kernel = choose_decode_kernel("auto", dtype, layout.mesh)
    compute = Compute(dtype, decode_attention=decode_kernel)
    engine = Engine(model.config, compute, processor.stop_ids, min(limit, 256), _CHECK_EVERY)
    size = prompt.size
    batch = pad_prompts(
        [prompt], _round_up(size.tokens, _PROMPT_STEP), _round_up(size.windows, _WINDOW_STEP)
    )
    stream = None if args.json else TextStream(processor, args.max_new_tokens)
    if args.samples > 1 and not args.json:
        print("--- sample 1")
    rollout = engine.generate(
        params,
        engine.fill(params),
        layout.put_batch(batch),
        group_size=args.samples,
        max_new_tokens=limit,
        key=jax.random.key(args.seed),
        prompt_index=np.zeros(1, np.int32),
        sampling=args.sampling,
        on_tokens=stream,
    )
    samples = [_sample(processor, rollout, g, args.max_new_tokens) for g in range(args.samples)]
    if args.json:
        print(json.dumps({"prompt_ids": prompt.ids.tolist(), "samples": samples}))
        return
    for number, sample in enumerate(samples, 1):
        if number > 1:
            print(f"--- sample {number}")
        shown = stream.shown if stream and number == 1 else 0  # the stream held back the rest
        print(sample["text"][shown:], end="")
        print("" if sample["finished"] else " […]")


def _prompt(processor: Processor, args: argparse.Namespace) -> Prompt:
    """Reads images and videos; raises `UserError` where the prompt exceeds the context length."""
    try:
        images = [open_image(path) for path in args.image]
        videos = [open_video(path, args.fps, args.max_frames) for path in args.video]
    except BadImage as error:
        raise UserError(f"{str(error).rstrip('.')}: give another --image or --video.") from error
    question = f"{args.question} {FORMAT_PROMPT}" if args.reasoning else args.question
    max_tokens = processor.config.text.max_position_embeddings - args.max_new_tokens
    if args.max_prompt_tokens is not None:
        max_tokens = min(max_tokens, args.max_prompt_tokens)
    return processor.prompt(question, images, videos, max_tokens)


class TextStream:
    """Prints the first sample's text while it is generated.

    Attributes:
      shown: characters printed so far.
    """

    def __init__(self, processor: Processor, max_tokens: int):
        self._processor, self._max_tokens, self.shown = processor, max_tokens, 0

    def __call__(self, tokens: np.ndarray, length: np.ndarray) -> None:
        """Prints what is new; tokens [1, G, R] int32 and lengths [1, G] so far."""
        ids = tokens[0, 0, : min(int(length[0, 0]), self._max_tokens)]
        # An incomplete UTF-8 character decodes to U+FFFD: it is held back.
        text = self._processor.decode(ids).rstrip("\ufffd")
        print(text[self.shown :], end="", flush=True)
        self.shown = max(self.shown, len(text))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m spatial_ssrl_jax.generate",
        description="Asks a model about images and videos; greedy unless a temperature is given.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder, checkpoint or hub id")
    parser.add_argument("--image", action="append", default=[], type=Path, help="may be repeated")
    parser.add_argument("--video", action="append", default=[], type=Path, help="may be repeated")
    parser.add_argument("--fps", type=float, default=FPS, help="frames a second of a video")
    parser.add_argument("--max-frames", type=int, default=MAX_FRAMES, help="of one video")
    parser.add_argument("--question", required=True)
    parser.add_argument("--reasoning", action="store_true", help="append the format prompt")
    parser.add_argument(
        "--max-prompt-tokens", type=int, help="of a prompt: the model's context length"
    )
    add_inference_options(parser, new_tokens=512)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    args.sampling = check_inference_options(args)
    if not 0 < args.fps < math.inf or args.max_frames < 2:
        raise UserError("--fps must be above 0, and --max-frames at least 2.")
    if args.max_prompt_tokens is not None and args.max_prompt_tokens < 1:
        raise UserError("--max-prompt-tokens must be at least 1.")
    return args


def _sample(processor: Processor, rollout: Rollout, g: int, max_tokens: int) -> dict[str, Any]:
    """Sample g: ids (end token included), log-probabilities, text, and whether it ended."""
    length = min(int(rollout.length[0, g]), max_tokens)
    ids = rollout.tokens[0, g, :length]
    return {
        "ids": ids.tolist(),
        "logprobs": [float(p) for p in rollout.logprobs[0, g, :length]],
        "text": processor.decode(ids),
        "finished": bool(rollout.finished[0, g]) and int(rollout.length[0, g]) <= max_tokens,
    }


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


if __name__ == "__main__":
    run_command(main)

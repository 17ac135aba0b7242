"""Answers: python -m spatial_ssrl_jax.generate --model=DIR --image=F --video=F --question=TEXT"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spatial_ssrl_jax.common.errors import BadImage, UserError, run_command
from spatial_ssrl_jax.common.text import printable
from spatial_ssrl_jax.data.images import open_image
from spatial_ssrl_jax.data.videos import FPS, MAX_FRAMES, open_video
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT

if TYPE_CHECKING:
    from spatial_ssrl_jax.data.processor import Processor, Prompt


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    # Imports that take seconds come after the options are checked.
    from spatial_ssrl_jax.checkpoint.models import open_model
    from spatial_ssrl_jax.data.processor import Processor
    from spatial_ssrl_jax.inference.policy import Policy

    folder = open_model(args.model)
    processor = Processor(folder.files, folder.config, args.min_pixels, args.max_pixels)
    prompt = _prompt(processor, args)  # before the weights are loaded, which takes long
    policy = Policy.open(folder, dtype=args.dtype, processor=processor)
    stream = None if args.json else TextStream(processor, args.max_new_tokens)
    if args.samples > 1 and not args.json:
        print("--- sample 1")
    responses = policy.generate(
        prompt,
        samples=args.samples,
        sampling=args.sampling,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        on_tokens=stream,
    )
    if args.json:
        samples = [response.as_json() for response in responses]
        print(json.dumps({"prompt_ids": prompt.ids.tolist(), "samples": samples}))
        return
    for number, response in enumerate(responses, 1):
        if number > 1:
            print(f"--- sample {number}")
        shown = stream.shown if stream and number == 1 else 0  # the stream held back the rest
        print(printable(response.text[shown:]), end="")
        print("" if response.finished else " […]")


def _prompt(processor: "Processor", args: argparse.Namespace) -> "Prompt":
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

    def __init__(self, processor: "Processor", max_tokens: int):
        self._processor, self._max_tokens, self.shown = processor, max_tokens, 0

    def __call__(self, tokens: np.ndarray, length: np.ndarray) -> None:
        """Prints what is new; tokens [1, G, R] int32 and lengths [1, G] so far."""
        ids = tokens[0, 0, : min(int(length[0, 0]), self._max_tokens)]
        # An incomplete UTF-8 character decodes to U+FFFD: it is held back.
        text = self._processor.decode(ids).rstrip("\ufffd")
        print(printable(text[self.shown :]), end="", flush=True)
        self.shown = max(self.shown, len(text))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    from spatial_ssrl_jax.inference.options import add_inference_options, check_inference_options

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


if __name__ == "__main__":
    run_command(main)

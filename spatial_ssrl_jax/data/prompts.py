"""From question and pictures to what the model reads: chat text, tokens, patches, indices."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from spatial_ssrl_jax.data.windows import Grid, lay_out_windows, merged_tokens, mrope_positions
from spatial_ssrl_jax.errors import BadPicture, UserError
from spatial_ssrl_jax.qwen2_5_vl.config import Qwen2_5_VLConfig

PROCESSOR_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
_IMAGE_MARK = re.compile(r"<image(\d*)>")


@dataclass(frozen=True)
class Prompt:
    """One prompt before padding.

    Attributes:
      ids: [T] int32 token ids, each picture's places filled in.
      position: [3, T] int32 M-RoPE positions.
      next_position: position of the first response token.
      image_index: [T] int32 merged vision token at each place, -1 for text.
      patches: [W, S, C·2·14·14] float32 normalised pixels in windows.
      frame: [W, S] int32, which picture; -1 is padding.
      coords: [W, S, 2] int32, row and column of each patch.
    """

    ids: np.ndarray
    position: np.ndarray
    next_position: int
    image_index: np.ndarray
    patches: np.ndarray
    frame: np.ndarray
    coords: np.ndarray


class Processor:
    """A model folder's tokenizer, chat template and picture settings.

    Args:
      folder: holds `tokenizer_config.json`, `preprocessor_config.json` and the chat template.
      config: the model's shape and token ids.
      min_pixels, max_pixels: override the folder's limits on a picture's area in pixels.

    Raises:
      UserError: a file is missing.
    """

    def __init__(
        self,
        folder: Path,
        config: Qwen2_5_VLConfig,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ):
        self.folder, self.config = Path(folder), config
        for name in ("tokenizer_config.json", "preprocessor_config.json"):
            if not (self.folder / name).is_file():
                raise UserError(
                    f"{self.folder / name} is missing: copy it from the model's hub page."
                )
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self._template = self._read_template()
        settings = json.loads((self.folder / "preprocessor_config.json").read_text())
        size = settings.get("size", {})
        self.min_pixels = min_pixels or settings.get("min_pixels") or size["shortest_edge"]
        self.max_pixels = max_pixels or settings.get("max_pixels") or size["longest_edge"]
        self._images = Qwen2VLImageProcessorPil(
            size={"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            image_mean=settings["image_mean"],
            image_std=settings["image_std"],
            patch_size=config.vision.patch_size,
            temporal_patch_size=config.vision.temporal_patch_size,
            merge_size=config.vision.spatial_merge_size,
        )
        self.stop_ids = self._read_stop_ids()

    def _read_template(self) -> str:
        path = self.folder / "chat_template.json"
        if path.is_file():
            return json.loads(path.read_text())["chat_template"]
        if self.tokenizer.chat_template:
            return self.tokenizer.chat_template
        raise UserError(f"{path} is missing: copy it from the model's hub page.")

    def _read_stop_ids(self) -> tuple[int, ...]:
        path = self.folder / "generation_config.json"
        if not path.is_file():
            return (self.config.eos_token_id,)
        ids = json.loads(path.read_text()).get("eos_token_id", self.config.eos_token_id)
        return tuple(ids) if isinstance(ids, list) else (ids,)

    def grid(self, height: int, width: int) -> Grid:
        """The patch grid of a picture, from its size in pixels alone."""
        patch = self.config.vision.patch_size
        factor = patch * self.config.vision.spatial_merge_size
        try:
            high, wide = smart_resize(height, width, factor, self.min_pixels, self.max_pixels)
        except ValueError as error:
            raise BadPicture(
                f"a picture of {width}x{height} pixels cannot be used: {error}."
            ) from None
        return 1, high // patch, wide // patch

    def patches(self, image: np.ndarray) -> tuple[np.ndarray, Grid]:
        """Resizes, normalises and cuts one picture.

        Args:
          image: [H, W, 3] uint8.

        Returns:
          [h·w, C·2·14·14] float32 patches, merged token by merged token, and the grid.
        """
        grid = self.grid(*image.shape[:2])
        out = self._images(images=[image], return_tensors="np", input_data_format="channels_last")
        return np.asarray(out["pixel_values"], np.float32), grid

    def chat(self, question: str, images: int) -> str:
        """The chat text with one picture token a picture, up to the assistant's turn.

        Pictures stand where `<image>` or `<imageN>` stands in the question, else in front of it.
        """
        content, end, used = [], 0, 0
        if not _IMAGE_MARK.search(question):
            content, used = [{"type": "image"}] * images, images
        for mark in _IMAGE_MARK.finditer(question):
            if mark.start() > end:
                content.append({"type": "text", "text": question[end : mark.start()]})
            content.append({"type": "image"})
            end, used = mark.end(), used + 1
        content.append({"type": "text", "text": question[end:]})
        if used != images:
            raise UserError(
                f"the question has places for {used} pictures, but {images} were given."
            )
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=True,
        )

    def prompt(self, question: str, images: tuple[np.ndarray, ...]) -> Prompt:
        """Builds the whole prompt of one question.

        Args:
          question: the user's text; see `chat` for where pictures go.
          images: [H, W, 3] uint8 each, in prompt order.
        """
        config = self.config
        cut = [self.patches(image) for image in images]
        grids = [grid for _, grid in cut]
        ids = self._expand(self.chat(question, len(images)), grids)
        layout = lay_out_windows(config.vision, grids)
        is_vision = ids == config.image_token_id
        position = mrope_positions(config.vision, is_vision, grids, [None] * len(grids))
        image_index = np.full(len(ids), -1, np.int32)
        image_index[is_vision] = layout.merged
        flat = np.concatenate(
            [p for p, _ in cut] + [np.zeros((1, config.vision.patch_dim), np.float32)]
        )
        return Prompt(
            ids=ids,
            position=position,
            next_position=int(position.max()) + 1,
            image_index=image_index,
            patches=flat[layout.source],
            frame=layout.frame,
            coords=layout.coords,
        )

    def _expand(self, text: str, grids: list[Grid]) -> np.ndarray:
        """Token ids with each picture token repeated as often as its grid asks for."""
        ids = np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        places = np.flatnonzero(ids == self.config.image_token_id)
        if len(places) != len(grids):
            raise UserError("the question's text itself holds a picture token; leave it out.")
        repeat = np.ones(len(ids), np.int64)
        repeat[places] = [merged_tokens(self.config.vision, grid) for grid in grids]
        return np.repeat(ids, repeat)

    def encode_response(self, text: str) -> np.ndarray:
        """[R] int32 token ids of a response, the end token included."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return np.array([*ids, self.config.eos_token_id], np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """Text of response tokens, without special tokens."""
        return self.tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

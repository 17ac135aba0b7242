"""From question, images and videos to what the model reads: text, tokens, patches, indices."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.data.videos import Video
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.family import member_of
from spatial_ssrl_jax.qwen_vl.inputs import Grid, merged_tokens

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
_MARK = re.compile(r"<(image|video)(\d*)>")
_PLURAL = {"image": "pictures", "video": "videos"}
# An image or video of a prompt: "image" or "video", and its place among those of its kind.
MediaSlot = tuple[str, int]


@dataclass(frozen=True)
class Prompt:
    """One prompt before padding.

    Attributes:
      ids: [T] int32 token ids, each image's or video's places filled in.
      position: [3, T] int32 M-RoPE positions.
      next_position: position of the first response token.
      image_index: [T] int32 merged vision token at each place, -1 for text.
      patches: [W, S, C·2·14·14] float32 normalised pixels in windows.
      frame: [W, S] int32, which image or temporal frame; -1 is padding.
      coords: [W, S, 2] int32, row and column of each patch.
    """

    ids: np.ndarray
    position: np.ndarray
    next_position: int
    image_index: np.ndarray
    patches: np.ndarray
    frame: np.ndarray
    coords: np.ndarray


@dataclass(frozen=True)
class PromptSize:
    """Tokens and vision windows of a prompt."""

    tokens: int
    windows: int


class Processor:
    """A model folder's tokenizer, chat template and image settings.

    Args:
      folder: holds `tokenizer_config.json`, `preprocessor_config.json` and the chat template.
      config: the model's shape and token ids.
      min_pixels, max_pixels: override the folder's limits on the area of an image or of a
        video's frame, in pixels.

    Raises:
      UserError: a file is missing, or the limits leave no area.
    """

    def __init__(
        self,
        folder: Path,
        config: QwenVLConfig,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ):
        self.folder, self.config = Path(folder), config
        self._member = member_of(config)
        for name in ("tokenizer_config.json", "preprocessor_config.json"):
            if not (self.folder / name).is_file():
                raise UserError(
                    f"{self.folder / name} is missing: copy it from the model's hub page."
                )
        words = ("tokenizer.json", "vocab.json", "merges.txt")
        there = [(self.folder / name).is_file() for name in words]
        if not (there[0] or all(there[1:])):  # Transformers would continue with no words at all
            raise UserError(
                f"{self.folder} has neither tokenizer.json nor vocab.json with merges.txt: copy "
                "them from the model's hub page."
            )
        self.tokenizer = _read_tokenizer(self.folder)
        self._template = self._read_template()
        self._images = self._picture_settings("preprocessor_config.json", min_pixels, max_pixels)
        own = "video_preprocessor_config.json"  # folders without it treat frames like images
        name = own if (self.folder / own).is_file() else "preprocessor_config.json"
        self._frames = self._picture_settings(name, min_pixels, max_pixels)
        self.stop_ids = self._read_stop_ids()

    def _picture_settings(
        self, name: str, min_pixels: int | None, max_pixels: int | None
    ) -> Qwen2VLImageProcessorPil:
        settings, vision = _read_json(self.folder / name), self.config.vision
        size = settings.get("size", {})
        least = min_pixels or settings.get("min_pixels") or size.get("shortest_edge")
        most = max_pixels or settings.get("max_pixels") or size.get("longest_edge")
        if not (least and most and "image_mean" in settings and "image_std" in settings):
            raise UserError(
                f"{self.folder / name} lacks the image's size, image_mean or image_std: copy it "
                "from the model's hub page."
            )
        if least > most:
            raise UserError(
                f"the smallest image area, {least} pixels, is above the largest, {most}: "
                "change min_pixels or max_pixels."
            )
        return Qwen2VLImageProcessorPil(
            size={"shortest_edge": least, "longest_edge": most},
            image_mean=settings["image_mean"],
            image_std=settings["image_std"],
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
        )

    def _read_template(self) -> str:
        path = self.folder / "chat_template.json"
        if path.is_file():
            return _read_json(path).get("chat_template", "")
        if self.tokenizer.chat_template:
            return self.tokenizer.chat_template
        raise UserError(f"{path} is missing: copy it from the model's hub page.")

    def _read_stop_ids(self) -> tuple[int, ...]:
        path = self.folder / "generation_config.json"
        if not path.is_file():
            return (self.config.eos_token_id,)
        ids = _read_json(path).get("eos_token_id", self.config.eos_token_id)
        return tuple(ids) if isinstance(ids, list) else (ids,)

    def grid(self, height: int, width: int) -> Grid:
        """The patch grid of an image, from its size in pixels alone.

        Raises:
          BadPicture: one side is more than 200 times the other.
        """
        return self._grid(self._images, 1, height, width)

    def video_grid(self, frames: int, height: int, width: int) -> Grid:
        """The patch grid of a video, from its number of frames and their size in pixels alone."""
        times = -(-frames // self.config.vision.temporal_patch_size)
        return self._grid(self._frames, times, height, width)

    def _grid(
        self, settings: Qwen2VLImageProcessorPil, times: int, height: int, width: int
    ) -> Grid:
        patch = self.config.vision.patch_size
        factor = patch * self.config.vision.spatial_merge_size
        limits = settings.size["shortest_edge"], settings.size["longest_edge"]
        try:
            high, wide = smart_resize(height, width, factor, *limits)
        except ValueError as error:
            raise BadImage(
                f"an image of {width}x{height} pixels cannot be used: {error}."
            ) from None
        return times, high // patch, wide // patch

    def measure(
        self,
        sizes: Sequence[tuple[int, int]],
        question: str | None = None,
        videos: Sequence[tuple[int, int, int]] = (),
    ) -> PromptSize:
        """How large a prompt will be, from the sizes of its images and videos alone.

        Args:
          sizes: (height, width) of each image in pixels.
          question: the user's text; without it only what the images take is counted.
          videos: (frames, height, width) of each video.

        Raises:
          BadPicture: an image's aspect is too extreme.
        """
        grids = {
            "image": [self.grid(*size) for size in sizes],
            "video": [self.video_grid(*size) for size in videos],
        }
        every = [*grids["image"], *grids["video"]]
        windows = self._member.window_count(self.config.vision, every)
        if question is None:
            return PromptSize(
                sum(merged_tokens(self.config.vision, grid) for grid in every), windows
            )
        text, order = self.chat(question, len(sizes), len(videos))
        return PromptSize(len(self._expand(text, order, [grids[k][i] for k, i in order])), windows)

    def patches(self, image: np.ndarray) -> tuple[np.ndarray, Grid]:
        """Resizes, normalises and cuts one image.

        Args:
          image: [H, W, 3] uint8.

        Returns:
          [h·w, C·2·14·14] float32 patches, merged token by merged token, and the grid.
        """
        return self._cut(self._images, image), self.grid(*image.shape[:2])

    def video_patches(self, video: Video) -> tuple[np.ndarray, Grid]:
        """Resizes, normalises and cuts one video; an odd last frame is taken twice.

        Returns:
          [t·h·w, C·2·14·14] float32 patches, time by time, each as in an image; and the grid.
        """
        vision = self.config.vision
        grid = self.video_grid(*video.frames.shape[:3])
        together = vision.temporal_patch_size
        cut = []
        for first in range(0, grid[0] * together, together):
            places = np.minimum(np.arange(first, first + together), len(video.frames) - 1)
            # Each frame cut as an image fills every temporal slot: keep its own one.
            parts = [
                self._cut(self._frames, video.frames[place]).reshape(
                    grid[1] * grid[2], vision.in_channels, together, -1
                )[:, :, slot]
                for slot, place in enumerate(places)
            ]
            cut.append(np.stack(parts, axis=2).reshape(grid[1] * grid[2], -1))
        return np.concatenate(cut), grid

    @staticmethod
    def _cut(settings: Qwen2VLImageProcessorPil, image: np.ndarray) -> np.ndarray:
        out = settings(images=[image], return_tensors="np", input_data_format="channels_last")
        return np.asarray(out["pixel_values"], np.float32)

    def chat(self, question: str, images: int, videos: int = 0) -> tuple[str, list[MediaSlot]]:
        """The chat text up to the assistant's turn, with one token an image or video.

        Images stand where `<image>` (the next one) or `<image2>` (the second one) is in the
        question, videos likewise at `<video>`; those of a kind without a mark are in front.

        Returns:
          The text, and the images and videos in the order of their places in it.

        Raises:
          UserError: the question's places are not those of the images and videos given.
        """
        content, order = _places(question, {"image": images, "video": videos})
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=True,
        )
        return text, order

    def prompt(
        self,
        question: str,
        images: Sequence[np.ndarray] = (),
        videos: Sequence[Video] = (),
        most: int | None = None,
    ) -> Prompt:
        """Builds the whole prompt of one question.

        Args:
          question: the user's text; see `chat` for where images and videos go.
          images: [H, W, 3] uint8 each, in the order that the question numbers them.
          videos: likewise.
          most: tokens at most; None sets no limit.

        Raises:
          UserError: more than `most` tokens, found before any image is cut; or see `chat`.
          BadPicture: an image too long and thin.
        """
        vision = self.config.vision
        text, order = self.chat(question, len(images), len(videos))
        grids = [
            self.grid(*images[i].shape[:2])
            if kind == "image"
            else self.video_grid(*videos[i].frames.shape[:3])
            for kind, i in order
        ]
        ids = self._expand(text, order, grids)
        is_vision = np.isin(ids, (self.config.image_token_id, self.config.video_token_id))
        if most is not None and len(ids) > most:
            raise UserError(
                f"the prompt has {len(ids)} tokens, {is_vision.sum()} of them of images, but at "
                f"most {most} fit: use smaller images, fewer frames or a shorter question."
            )
        seconds = [
            vision.temporal_patch_size / videos[i].fps if kind == "video" else None
            for kind, i in order
        ]
        position = self._member.mrope_positions(vision, is_vision, grids, seconds)
        layout = self._member.lay_out_windows(vision, grids)
        image_index = np.full(len(ids), -1, np.int32)
        image_index[is_vision] = layout.merged
        cut = [
            (self.patches(images[i]) if kind == "image" else self.video_patches(videos[i]))[0]
            for kind, i in order
        ]
        flat = np.concatenate([*cut, np.zeros((1, vision.patch_dim), np.float32)])
        return Prompt(
            ids=ids,
            position=position,
            # After the last word, as the reference's passes and `generate` continue, which after a
            # long video is not the largest position that its rope delta goes by.
            next_position=int(position[0, -1]) + 1,
            image_index=image_index,
            patches=flat[layout.source],
            frame=layout.frame,
            coords=layout.coords,
        )

    def _expand(self, text: str, order: list[MediaSlot], grids: list[Grid]) -> np.ndarray:
        """Token ids with each image or video token repeated as often as its grid asks for."""
        token = {"image": self.config.image_token_id, "video": self.config.video_token_id}
        ids = np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        places = np.flatnonzero(np.isin(ids, list(token.values())))
        if ids[places].tolist() != [token[kind] for kind, _ in order]:
            raise UserError("the question's text itself holds an image token; leave it out.")
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


def _places(question: str, given: dict[str, int]) -> tuple[list[dict], list[MediaSlot]]:
    """The chat's content parts, and the images and videos in the order that they are in it.

    Args:
      question: with or without marks; see `Processor.chat`.
      given: how many there are of each kind.
    """
    marks = list(_MARK.finditer(question))
    marked = {mark[1] for mark in marks}
    order = [(kind, i) for kind in given if kind not in marked for i in range(given[kind])]
    content, end = [{"type": kind} for kind, _ in order], 0
    for mark in marks:
        if mark.start() > end:
            content.append({"type": "text", "text": question[end : mark.start()]})
        content.append({"type": mark[1]})
        earlier = sum(kind == mark[1] for kind, _ in order)
        order.append((mark[1], int(mark[2]) - 1 if mark[2] else earlier))
        end = mark.end()
    content.append({"type": "text", "text": question[end:]})
    for kind, count in given.items():
        places = [i for of, i in order if of == kind]
        if sorted(places) != list(range(count)):
            named = ", ".join(str(i + 1) for i in places) or "none"
            raise UserError(
                f"the question has places for {len(places)} {_PLURAL[kind]} (number {named}), "
                f"but {count} were given: give as many as it has places for."
            )
    return content, order


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # Transformers hands on whatever its parsers meet
        raise UserError(
            f"the tokenizer in {folder} cannot be read ({error}): copy its files again."
        ) from error


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy it again.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object: copy it again.")
    return found

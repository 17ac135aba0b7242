"""From question, images and videos to the model's inputs: text, tokens, patches, indices."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from spatial_ssrl_jax.common.bounds import Bounds
from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.common.json_file import JsonObject, read_object
from spatial_ssrl_jax.common.text import error_line
from spatial_ssrl_jax.data.placeholders import MediaSlot, chat_content
from spatial_ssrl_jax.data.responses import ResponseCodec
from spatial_ssrl_jax.data.videos import Video
from spatial_ssrl_jax.qwen_vl.config import PIXEL_KEYS, QwenVLConfig, VisionConfig
from spatial_ssrl_jax.qwen_vl.family import member_of, read_processor
from spatial_ssrl_jax.qwen_vl.inputs import Grid, merged_tokens, patch_count

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
_TRIAL = "Where is it?"  # a question that shows whether tokenizer and chat template work
_KEPT_CHATS = 1024  # tokenized questions, as most tasks ask few different ones
_MAX_TEMPLATE = 100_000  # characters that a chat template may add to a question, and to each image
# Of the areas in a folder: every image is enlarged to the smallest one.
_SMALLEST, _LARGEST = Bounds(min=1, max=2**26), Bounds(min=1)
_ALWAYS = ("do_resize", "do_rescale", "do_normalize")
_RESAMPLING = Bounds(min=min(Image.Resampling), max=max(Image.Resampling))


@dataclass(frozen=True)
class Prompt:
    """One prompt before padding.

    Attributes:
      ids: [T] int32 token ids, one for each merged vision token of an image or video.
      position: [3, T] int32 M-RoPE positions.
      next_position: position of the first response token.
      image_index: [T] int32 merged vision token at each position, -1 for text.
      patches: [P, C·2·14·14] uint8 pixels, in the vision tower's order.
      frame: [P] int32, which image or temporal frame.
      coords: [P, 2] int32, row and column of each patch.
    """

    ids: np.ndarray
    position: np.ndarray
    next_position: int
    image_index: np.ndarray
    patches: np.ndarray
    frame: np.ndarray
    coords: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, np.ndarray))


@dataclass(frozen=True)
class PromptSize:
    """Tokens and patches of a prompt."""

    tokens: int
    patches: int


@dataclass(frozen=True)
class ResizeSettings:
    """How images are resized: the limits of their area in pixels, and PIL's filter."""

    min_pixels: int
    max_pixels: int
    resample: int


@dataclass(frozen=True)
class ImageArea:
    """Limits of an image's area, in pixels, in training: a resizing before the processor's own.

    As in EasyR1 and LLaMA-Factory, with which the paper's models were trained: the aspect is kept,
    and sides are rounded down.
    """

    min_pixels: int
    max_pixels: int

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of an image between the limits."""
        for limit, is_outside in (
            (self.max_pixels, height * width > self.max_pixels),
            (self.min_pixels, height * width < self.min_pixels),
        ):
            if is_outside:
                scale = math.sqrt(limit / (height * width))
                height, width = max(int(height * scale), 1), max(int(width * scale), 1)
        return height, width


class Processor:
    """A model folder's tokenizer, chat template and image settings.

    Args:
      folder: holds `tokenizer_config.json`, the chat template, and `preprocessor_config.json` or
        Transformers 5's `processor_config.json`.
      config: the model's shape and token ids.
      min_pixels, max_pixels: override the folder's limits on the area of an image or of a
        video's frame, in pixels.
      area: brings images between limits of its own first.

    Raises:
      UserError: a file is missing, or the limits leave no area.
    """

    def __init__(
        self,
        folder: Path,
        config: QwenVLConfig,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        area: ImageArea | None = None,
    ):
        self.folder, self.config, self.area = Path(folder), config, area
        self._member = member_of(config)
        settings = read_processor(self.folder, "image")
        for needed in (self.folder / "tokenizer_config.json", Path(settings.name)):
            if not needed.is_file():
                raise UserError(f"{needed} is missing: copy it from the model's hub page.")
        vocabulary = ("tokenizer.json", "vocab.json", "merges.txt")
        exists = [(self.folder / name).is_file() for name in vocabulary]
        if not (exists[0] or all(exists[1:])):  # Transformers would continue without a vocabulary
            raise UserError(
                f"{self.folder} has neither tokenizer.json nor vocab.json with merges.txt: copy "
                "them from the model's hub page."
            )
        self.tokenizer = _read_tokenizer(self.folder)
        self._template, self._template_file = self._read_template()
        self._chats: dict[tuple[str, int, int], tuple[np.ndarray, list[MediaSlot]]] = {}
        self._images = self._image_settings(settings, min_pixels, max_pixels)
        frames = read_processor(self.folder, "video")
        self._frames = self._image_settings(frames, min_pixels, max_pixels)
        self.stop_ids = self._read_stop_ids()
        opening = self._check_template()
        self._responses = ResponseCodec(self.tokenizer, config.eos_token_id, opening)

    def _image_settings(
        self, settings: JsonObject, min_pixels: int | None, max_pixels: int | None
    ) -> ResizeSettings:
        size = settings.section("size")
        smallest, largest = (
            given or settings.find(old, int, bounds) or size.find(new, int, bounds)
            for given, old, new, bounds in (
                (min_pixels, "min_pixels", "shortest_edge", _SMALLEST),
                (max_pixels, "max_pixels", "longest_edge", _LARGEST),
            )
        )
        if not smallest or not largest or not set(PIXEL_KEYS) <= settings.values.keys():
            raise UserError(
                f"{settings.name} lacks the image's size, image_mean or image_std: copy it from "
                "the model's hub page."
            )
        if smallest > largest:
            raise UserError(
                f"the smallest image area, {smallest} pixels, is above the largest, {largest}: "
                "change min_pixels or max_pixels."
            )
        scale = settings.get("rescale_factor", float, 1 / 255)
        fits = {"rescale_factor": math.isclose(scale, 1 / 255, rel_tol=1e-6)}
        fits |= {key: settings.get(key, bool, True) for key in _ALWAYS}
        for key, expected in {**dict.fromkeys(_ALWAYS, True), "rescale_factor": 1 / 255}.items():
            if not fits[key]:
                raise UserError(
                    f"{settings.name} sets {key} to {settings.values[key]}, which is not "
                    f"supported; expected {expected}."
                )
        for key in PIXEL_KEYS:
            value = getattr(self.config.vision, key)
            if settings.items(key, float) != value:
                raise UserError(
                    f"{settings.name} has another {key} than the model is opened with, "
                    f"{list(value)}: give all files of the folder the same."
                )
        resample = settings.get("resample", int, Image.Resampling.BICUBIC, _RESAMPLING)
        return ResizeSettings(smallest, largest, resample)

    def _read_template(self) -> tuple[str, Path]:
        """The chat template and its file."""
        path = self.folder / "chat_template.json"
        if path.is_file():
            return read_object(path).get("chat_template", str), path
        template = self.tokenizer.chat_template
        if isinstance(template, dict):  # several, by name
            template = template.get("default")
        if not template:
            raise UserError(f"{path} is missing: copy it from the model's hub page.")
        own = self.folder / "chat_template.jinja"
        path = own if own.is_file() else self.folder / "tokenizer_config.json"
        if not isinstance(template, str):
            raise UserError(f"{path} holds no chat template that is text: fetch it again.")
        return template, path

    def _read_stop_ids(self) -> tuple[int, ...]:
        """The token ids that end a response: the model's where the folder names none."""
        path, default = self.folder / "generation_config.json", (self.config.eos_token_id,)
        if not path.is_file():
            return default
        settings, known = read_object(path), Bounds(min=0, below=self.config.text.vocab_size)
        if isinstance(settings.values.get("eos_token_id"), list):
            return settings.items("eos_token_id", int, bounds=known) or default
        return (settings.get("eos_token_id", int, *default, known),)

    def _check_template(self) -> str:
        """Checks with a trial chat that the text and the token of an image come out of it.

        Returns:
          What follows the question: the end of the user's turn, and what begins the assistant's.

        Raises:
          UserError: the template is broken, or of another model.
        """
        text, _ = self.chat(_TRIAL, 1)
        images = int((self._token_ids(text) == self.config.image_token_id).sum())
        if _TRIAL not in text or images != 1:
            raise UserError(
                f"{self._template_file} does not make a chat with an image, whose token is "
                f"{self.config.image_token_id} in config.json: fetch the model's files again."
            )
        return text[text.rindex(_TRIAL) + len(_TRIAL) :]

    def grid(self, height: int, width: int) -> Grid:
        """The patch grid of an image, from its size in pixels alone.

        Raises:
          BadImage: one side is more than 200 times the other.
        """
        return self._grid(self._images, 1, *self._first_size(height, width))

    def _first_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of an image after the resizing that comes before the processor's own."""
        return self.area.size(height, width) if self.area else (height, width)

    def video_grid(self, frames: int, height: int, width: int) -> Grid:
        """The patch grid of a video, from its number of frames and their size in pixels alone."""
        times = -(-frames // self.config.vision.temporal_patch_size)
        return self._grid(self._frames, times, height, width)

    def _grid(self, settings: ResizeSettings, times: int, height: int, width: int) -> Grid:
        patch = self.config.vision.patch_size
        factor = patch * self.config.vision.spatial_merge_size
        limits = settings.min_pixels, settings.max_pixels
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
        """Size of a prompt, from the sizes of its images and videos alone.

        Args:
          sizes: (height, width) of each image in pixels.
          question: the user's text; without it only images and videos are counted.
          videos: (frames, height, width) of each video.

        Raises:
          BadImage: an image's aspect is too extreme.
        """
        grids = {
            "image": [self.grid(*size) for size in sizes],
            "video": [self.video_grid(*size) for size in videos],
        }
        every = [*grids["image"], *grids["video"]]
        patches = patch_count(every)
        if question is None:
            return PromptSize(
                sum(merged_tokens(self.config.vision, grid) for grid in every), patches
            )
        ids, order = self._chat_ids(question, len(sizes), len(videos))
        return PromptSize(len(self._expand(ids, order, [grids[k][i] for k, i in order])), patches)

    def patches(self, image: np.ndarray) -> tuple[np.ndarray, Grid]:
        """Resizes one image and splits it into patches.

        Args:
          image: [H, W, 3] uint8.

        Returns:
          [h·w, C·2·14·14] uint8 patches, merged token by merged token, and the grid.
        """
        grid, vision = self.grid(*image.shape[:2]), self.config.vision
        height, width = self._first_size(*image.shape[:2])
        pixels = Image.fromarray(image)
        if (height, width) != image.shape[:2]:
            pixels = pixels.resize((width, height), Image.Resampling.BICUBIC)
        resized = _resize(pixels, grid, vision.patch_size, self._images.resample)
        frames = np.broadcast_to(resized, (vision.temporal_patch_size, *resized.shape))
        return _patch_rows(frames, vision), grid

    def video_patches(self, video: Video) -> tuple[np.ndarray, Grid]:
        """As `patches`, of one video; an odd last frame is repeated.

        Returns:
          [t·h·w, C·2·14·14] uint8 patches, pair of frames by pair, each as in an image;
          and the grid.
        """
        vision = self.config.vision
        grid = self.video_grid(*video.frames.shape[:3])
        resample, count = self._frames.resample, grid[0] * vision.temporal_patch_size
        frames = [
            _resize(Image.fromarray(frame), grid, vision.patch_size, resample)
            for frame in video.frames
        ]
        frames += [frames[-1]] * (count - len(frames))
        return _patch_rows(np.stack(frames), vision), grid

    def chat(self, question: str, images: int, videos: int = 0) -> tuple[str, list[MediaSlot]]:
        """The chat text up to the assistant's turn, with one token an image or video.

        An image goes where the question has `<image>` (the next one) or `<image2>` (the second
        one), a video likewise at `<video>`; those of a kind without a placeholder come first.

        Returns:
          The text, and the images and videos in their order in it.

        Raises:
          UserError: the question's placeholders do not match the images and videos given.
        """
        try:
            question.encode()
        except UnicodeEncodeError:
            raise UserError(
                "the question holds characters that are no Unicode text: write it as UTF-8."
            ) from None
        content, order = chat_content(question, {"image": images, "video": videos})
        try:
            text = self.tokenizer.apply_chat_template(
                # Its annotation knows no content of several parts.
                [{"role": "user", "content": content}],  # pyright: ignore[reportArgumentType]
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # a template is a program, which may raise any
            raise UserError(
                f"the chat template in {self._template_file} fails ({error_line(error)}): fetch "
                "it again."
            ) from error
        assert isinstance(text, str)  # as it is not tokenized
        if len(text) > len(question) + _MAX_TEMPLATE * (1 + images + videos):
            raise UserError(
                f"the chat template in {self._template_file} adds {len(text) - len(question):,} "
                "characters to a question: fetch it again."
            )
        return text, order

    def prompt(
        self,
        question: str,
        images: Sequence[np.ndarray] = (),
        videos: Sequence[Video] = (),
        max_tokens: int | None = None,
    ) -> Prompt:
        """Builds the whole prompt of one question.

        Args:
          question: the user's text; see `chat` for where images and videos go.
          images: [H, W, 3] uint8 each, in the order that the question numbers them.
          videos: likewise.
          max_tokens: limit of the prompt's tokens; None sets none.

        Raises:
          UserError: more than `max_tokens` tokens, checked before any pixel is read; or see `chat`.
          BadImage: an image too long and thin.
        """
        vision = self.config.vision
        ids, order = self._chat_ids(question, len(images), len(videos))
        grids = [
            self.grid(*images[i].shape[:2])
            if kind == "image"
            else self.video_grid(*videos[i].frames.shape[:3])
            for kind, i in order
        ]
        ids = self._expand(ids, order, grids)
        is_vision = np.isin(ids, (self.config.image_token_id, self.config.video_token_id))
        if max_tokens is not None and len(ids) > max_tokens:
            raise UserError(
                f"the prompt has {len(ids)} tokens, {is_vision.sum()} of them of images, but at "
                f"most {max_tokens} fit: use smaller images, fewer frames or a shorter question."
            )
        seconds = [
            vision.temporal_patch_size / videos[i].fps if kind == "video" else None
            for kind, i in order
        ]
        position = self._member.mrope_positions(vision, is_vision, grids, seconds)
        layout = self._member.lay_out_patches(vision, grids)
        image_index = np.full(len(ids), -1, np.int32)
        image_index[is_vision] = layout.merged
        patches = (
            (self.patches(images[i]) if kind == "image" else self.video_patches(videos[i]))[0]
            for kind, i in order
        )
        return Prompt(
            ids=ids,
            position=position,
            # After the last text token, as the reference's forward passes and `generate` continue.
            # After a long video it is not the largest position, which its rope delta is based on.
            next_position=int(position[0, -1]) + 1,
            image_index=image_index,
            patches=_ordered(patches, layout.source, vision.patch_dim),
            frame=layout.frame,
            coords=layout.coords,
        )

    def _chat_ids(
        self, question: str, images: int, videos: int
    ) -> tuple[np.ndarray, list[MediaSlot]]:
        """`chat` as [t] int32 ids, one an image or video; the latest ones are kept."""
        key = question, images, videos
        found = self._chats.get(key)
        if found is None:
            text, order = self.chat(*key)
            found = self._token_ids(text), order
            if len(self._chats) >= _KEPT_CHATS:
                self._chats.clear()
            self._chats[key] = found
        return found

    def _expand(self, ids: np.ndarray, order: list[MediaSlot], grids: list[Grid]) -> np.ndarray:
        """[T] int32 ids, each image or video token repeated for each merged token of its grid."""
        token = self._media_tokens
        indices = np.flatnonzero(np.isin(ids, list(token.values())))
        if ids[indices].tolist() != [token[kind] for kind, _ in order]:
            raise UserError("the question's text itself holds an image token; leave it out.")
        repeat = np.ones(len(ids), np.int64)
        repeat[indices] = [merged_tokens(self.config.vision, grid) for grid in grids]
        return np.repeat(ids, repeat)

    @property
    def _media_tokens(self) -> dict[str, int]:
        return {"image": self.config.image_token_id, "video": self.config.video_token_id}

    def _token_ids(self, text: str) -> np.ndarray:
        """[T] int32 token ids of a text."""
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def encode_response(self, text: str) -> np.ndarray:
        """[R] int32 token ids of a response, the end token included; see `ResponseCodec`."""
        return self._responses.encode(text)

    def decode(self, ids: np.ndarray) -> str:
        """Text of response tokens, without special tokens; see `ResponseCodec`."""
        return self._responses.decode(ids)


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, after a trial: some settings of a wrong type are found by their use alone."""
    for name in ("tokenizer_config.json", "tokenizer.json", "vocab.json"):
        if (folder / name).is_file():
            read_object(folder / name)  # says better than Transformers what is wrong
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        ids = tokenizer(_TRIAL, add_special_tokens=False)["input_ids"]
        tokenizer.decode(ids, skip_special_tokens=True)
    except Exception as error:  # Transformers passes on any error of its parsers
        raise UserError(
            f"the tokenizer in {folder} cannot be read ({error_line(error)}): copy its files again."
        ) from error
    return tokenizer


def _resize(image: Image.Image, grid: Grid, patch: int, resample: int) -> np.ndarray:
    """[H, W, 3] uint8 of the grid's rows and columns of patches, resized as Transformers does."""
    size = grid[2] * patch, grid[1] * patch
    return np.asarray(image.resize(size, Image.Resampling(resample)))


def _ordered(patches: Iterable[np.ndarray], source: np.ndarray, dim: int) -> np.ndarray:
    """[P, dim] uint8, the rows of all images at their places, see `PatchLayout.source`."""
    ordered = np.empty((len(source), dim), np.uint8)
    places = np.argsort(source)
    for rows in patches:
        ordered[places[: len(rows)]] = rows
        places = places[len(rows) :]
    return ordered


def _patch_rows(frames: np.ndarray, config: VisionConfig) -> np.ndarray:
    """Frames as the rows that Transformers' image processor makes of them.

    Args:
      frames: [t·2, H, W, C]; sides are multiples of a merged token's.
      config: the vision tower's.

    Returns:
      [t·h·w, C·2·14·14] patches, merged token by merged token, in the dtype of `frames`.
    """
    depth, patch, merge = config.temporal_patch_size, config.patch_size, config.spatial_merge_size
    times, (high, wide, channels) = len(frames) // depth, frames.shape[1:]
    side = patch * merge
    split = frames.reshape(
        times, depth, high // side, merge, patch, wide // side, merge, patch, channels
    )
    return split.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, config.patch_dim)

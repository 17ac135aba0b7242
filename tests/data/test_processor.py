"""Prompts: the chat text, image tokens, patches and padding, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from spatial_ssrl_jax.checkpoint.export import copy_files
from spatial_ssrl_jax.checkpoint.models import TINY, open_model
from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.data import processor as module
from spatial_ssrl_jax.data.batching import pad_responses
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.data.videos import Video
from spatial_ssrl_jax.qwen_vl.family import read_config

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def config(shared):
    return read_config(shared / "qwen2_5_vl" / "3b")


@pytest.fixture(scope="module")
def processor(shared, config):
    return Processor(shared / "qwen2_5_vl", config)


def random_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    "question, images, content",
    [
        ("Where?", 0, "Where?"),
        ("Where?", 2, IMAGE + IMAGE + "Where?"),
        ("<image>Where?", 1, IMAGE + "Where?"),
        ("From <image> to <image>.", 2, f"From {IMAGE} to {IMAGE}."),
        ("A: <image1>\nB: <image2>", 2, f"A: {IMAGE}\nB: {IMAGE}"),
    ],
)
def test_chat_text(processor, question, images, content):
    expected = f"{SYSTEM}<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    assert processor.chat(question, images)[0] == expected


@pytest.mark.parametrize(
    "question, images", [("<image> and <image>", 1), ("<image>", 2), ("<image>", 0)]
)
def test_placeholders_must_match_images(processor, question, images):
    with pytest.raises(
        UserError, match=rf"has placeholders for \d images .* but {images} were given"
    ):
        processor.chat(question, images)


def test_images_and_videos_go_where_the_question_has_them(processor):
    """By number where placeholders have one; a kind without any in front, images first."""
    expected = {
        "Where?": (IMAGE * 2 + VIDEO + "Where?", [("image", 0), ("image", 1), ("video", 0)]),
        "<image2> or <image1>?": (
            f"{VIDEO}{IMAGE} or {IMAGE}?",
            [("video", 0), ("image", 1), ("image", 0)],
        ),
        "In <video>?": (
            f"{IMAGE * 2}In {VIDEO}?",
            [("image", 0), ("image", 1), ("video", 0)],
        ),
    }
    for question, (content, order) in expected.items():
        text, found = processor.chat(question, 2, 1)
        assert text == f"{SYSTEM}<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
        assert found == order
    for question in ("<image1> and <image1>", "<image1> and <image3>", "<image0><image1>"):
        with pytest.raises(UserError, match=r"placeholders for 2 images \(number .*\), but 2 were"):
            processor.chat(question, 2)
    with pytest.raises(UserError, match="placeholders for 1 videos"):
        processor.chat("<video>", 0)


def test_numbered_images_keep_their_pixels(processor):
    first, second = random_image(56, 84, 1), random_image(112, 56, 2)
    swapped = processor.prompt("<image2> or <image1>?", (first, second))
    straight = processor.prompt("<image> or <image>?", (second, first))
    np.testing.assert_array_equal(swapped.ids, straight.ids)
    np.testing.assert_array_equal(swapped.patches, straight.patches)


def test_image_token_in_the_question_is_refused(processor):
    with pytest.raises(UserError, match="itself holds an image token"):
        processor.prompt("What is <|image_pad|>?", (random_image(56, 56),))


def test_each_image_takes_its_tokens(processor, config):
    """56x84 and 112x56 pixels are 2x3 and 4x2 tokens, between their marker tokens."""
    prompt = processor.prompt(
        "From <image> to <image>!", (random_image(56, 84), random_image(112, 56))
    )
    pad = "<|image_pad|>"
    text, _ = processor.chat("From <image> to <image>!", 2)
    text = text.replace(pad, "#" * 6, 1).replace(pad, "#" * 8, 1).replace("#", pad)
    np.testing.assert_array_equal(prompt.ids, processor.tokenizer(text)["input_ids"])
    is_image = prompt.ids == config.image_token_id
    assert is_image.sum() == 14
    np.testing.assert_array_equal(prompt.image_index >= 0, is_image)
    assert len(set(prompt.image_index[is_image])) == 14
    assert prompt.position.shape == (3, len(prompt.ids))
    assert prompt.next_position == prompt.position[:, -1].max() + 1 < len(prompt.ids)


def test_a_question_asked_again_is_as_it_was_the_first_time(processor, monkeypatch):
    """Tokenized questions are kept, as many as fit, by their numbers of images and videos."""
    monkeypatch.setattr(module, "_KEPT_CHATS", 2)
    sizes, video = [(56, 56)], [(2, 56, 56)]
    asked = [
        ("Again?", []),
        ("Again?", sizes),
        ("Where?", sizes),
        ("Again?", []),
        ("Again?", sizes * 2),
    ]
    tokens = [processor.measure(images, question).tokens for question, images in asked]
    ids = [processor.prompt(q, [random_image(*size) for size in images]).ids for q, images in asked]
    assert tokens == [len(found) for found in ids]
    assert tokens[0] == tokens[3] == tokens[1] - 6 == tokens[4] - 12
    assert processor.measure([], "Again?", video).tokens == tokens[1]
    assert processor.measure(sizes, "Again?").tokens == tokens[1]
    assert len(processor._chats) <= 2


def test_prompt_without_images(processor):
    prompt = processor.prompt("Why?", ())
    assert prompt.patches.shape == (0, 1176) and prompt.frame.shape == (0,)
    assert (prompt.image_index == -1).all()
    assert prompt.next_position == len(prompt.ids)


def test_patches_by_hand(processor):
    """A patch is channel, frame (twice the same), row, column; four make a merged token."""
    image = random_image(84, 140)
    patches, grid = processor.patches(image)
    assert grid == (1, 6, 10) and patches.shape == (60, 1176)
    for token, row, column in ((0, 0, 0), (1, 0, 1), (5, 1, 0), (14, 2, 4)):
        for patch, (i, j) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
            y, x = 28 * row + 14 * i, 28 * column + 14 * j
            expected = image[y : y + 14, x : x + 14].transpose(2, 0, 1)[:, None].repeat(2, axis=1)
            found = patches[4 * token + patch].reshape(3, 2, 14, 14)
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("frames", [1, 4, 7])
def test_video_patches_by_hand(processor, frames):
    """A patch holds two frames in turn, of an odd video the last one twice; pair by pair."""
    rng = np.random.default_rng(frames)
    video = Video(rng.integers(0, 256, (frames, 56, 84, 3), np.uint8), fps=2.0)
    patches, grid = processor.video_patches(video)
    times = (frames + 1) // 2
    assert grid == (times, 4, 6) and patches.shape == (times * 24, 1176)
    for time in range(times):
        for token, row, column in ((0, 0, 0), (2, 0, 2), (4, 1, 1)):
            for patch, (i, j) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
                y, x = 28 * row + 14 * i, 28 * column + 14 * j
                found = patches[24 * time + 4 * token + patch].reshape(3, 2, 14, 14)
                for slot in (0, 1):
                    frame = video.frames[min(2 * time + slot, frames - 1), y : y + 14, x : x + 14]
                    np.testing.assert_array_equal(found[:, slot], frame.transpose(2, 0, 1))


def test_a_still_video_is_its_image_repeated(processor):
    """Resized alike: a size that is not a multiple of two patches."""
    still = random_image(75, 130)
    patches, grid = processor.video_patches(Video(np.stack([still] * 4), fps=1.0))
    expected, one = processor.patches(still)
    assert grid == (2, *one[1:])
    np.testing.assert_array_equal(patches, np.concatenate([expected] * 2))


def test_video_prompt(processor, config):
    """Frames at 1 a second: two seconds between times, two positions a second."""
    video = Video(np.zeros((5, 56, 84, 3), np.uint8), fps=1.0)
    prompt = processor.prompt("From <image> to <video>!", (random_image(56, 56),), (video,))
    indices = np.flatnonzero(prompt.ids == config.video_token_id)
    assert len(indices) == 3 * 6 and (prompt.ids == config.image_token_id).sum() == 4
    assert (prompt.image_index[indices] >= 0).all()
    time, row, column = prompt.position[:, indices] - prompt.position[0, indices[0]]
    assert time.tolist() == [0] * 6 + [4] * 6 + [8] * 6
    assert row.tolist() == [0, 0, 0, 1, 1, 1] * 3 and column.tolist() == [0, 1, 2] * 6
    after = prompt.position[:, indices[-1] + 1] - prompt.position[0, indices[0]]
    assert after.tolist() == [3, 3, 3]  # the longer side, as in an image
    assert prompt.next_position == prompt.position[0, -1] + 1
    assert set(prompt.frame) == {0, 1, 2, 3}


def test_video_settings_of_their_own(copied, config):
    """Frames go by `video_preprocessor_config.json` where the folder has one."""
    assert Processor(copied, config).video_grid(4, 28, 28) == (2, 4, 4)
    settings = json.loads((copied / "preprocessor_config.json").read_text())
    del settings["min_pixels"], settings["max_pixels"]
    settings["size"] = {"shortest_edge": 112 * 112, "longest_edge": 224 * 224}
    (copied / "video_preprocessor_config.json").write_text(json.dumps(settings))
    processor = Processor(copied, config)
    assert processor.video_grid(5, 28, 28) == (3, 8, 8) and processor.grid(28, 28) == (1, 4, 4)
    assert processor.video_grid(4, 2000, 2000) == (2, 16, 16)
    both = Processor(copied, config, 28 * 28, 56 * 56)
    assert both.video_grid(4, 28, 28) == (2, 2, 2) and both.grid(999, 999) == (1, 4, 4)
    for key, value in (("rescale_factor", 1 / 127.5), ("do_normalize", False)):
        other = json.dumps(settings | {key: value})
        (copied / "video_preprocessor_config.json").write_text(other)
        with pytest.raises(UserError, match=f"video_preprocessor_config.json sets {key} to"):
            Processor(copied, config)
    settings["image_std"] = [0.5, 0.5, 0.5]
    (copied / "video_preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="video_preprocessor_config.json has another image_std"):
        Processor(copied, config)


def test_limits_that_cross_are_refused(shared, config):
    with pytest.raises(UserError, match=r"area, 999 pixels, is above the largest, 998"):
        Processor(shared / "qwen2_5_vl", config, 999, 998)


def test_a_prompt_too_long_is_refused_before_pixels_are_read(processor, monkeypatch):
    length = len(processor.prompt("Where?", (random_image(112, 112),)).ids)
    assert (
        len(processor.prompt("Where?", (random_image(112, 112),), max_tokens=length).ids) == length
    )

    def refuse(*_):
        raise AssertionError("pixels were read")

    monkeypatch.setattr(processor, "patches", refuse)
    with pytest.raises(UserError, match=rf"{length} tokens, 16 of them .* most {length - 1} fit"):
        processor.prompt("Where?", (random_image(112, 112),), max_tokens=length - 1)


def test_prompt_patches_are_at_their_places(processor):
    """Each patch is the one that its frame and coordinates name."""
    images = (random_image(140, 84, 1), random_image(56, 252, 2))
    prompt = processor.prompt("?", images)
    assert len(prompt.frame) == 10 * 6 + 4 * 18
    for frame, coords, patch in zip(prompt.frame, prompt.coords, prompt.patches, strict=True):
        row, column = 14 * coords
        pixel = images[frame][row + 3, column + 5, 1]
        assert patch.reshape(3, 2, 14, 14)[1, 0, 3, 5] == pixel


def test_sizes_stay_within_limits(shared, config):
    """Sides are multiples of two patches, the area is in the limits, the shape is kept."""
    small, large = 8 * 28 * 28, 60 * 28 * 28
    processor = Processor(shared / "qwen2_5_vl", config, small, large)
    rng = np.random.default_rng(0)
    for height, width in np.exp(rng.uniform(np.log(40), np.log(3000), (200, 2))).astype(int):
        _, h, w = processor.grid(int(height), int(width))
        assert h % 2 == w % 2 == 0
        assert small <= h * w * 14 * 14 <= large or max(height, width) / min(height, width) > 8
        assert abs(h * 14 / 28 - w * 14 / 28 * height / width) <= 1 + height / width
    assert processor.grid(112, 140) == (1, 8, 10)  # fits as it is


def test_settings_come_from_the_folder(processor):
    assert processor.stop_ids == (151_645, 151_643)
    assert processor.grid(28, 28) == (1, 4, 4)  # raised to 3136 pixels
    high, wide = processor.grid(4000, 5000)[1:]  # lowered below 12,845,056
    assert 0.98 < high * wide * 14 * 14 / 12_845_056 <= 1


@pytest.mark.parametrize("height, width", [(10, 3000), (3000, 14)])
def test_extreme_shapes_are_bad_images(processor, height, width):
    with pytest.raises(BadImage, match=f"an image of {width}x{height} pixels cannot be used"):
        processor.grid(height, width)


@pytest.fixture
def copied(shared, tmp_path):
    for path in (shared / "qwen2_5_vl").glob("*.*"):
        shutil.copy(path, tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["tokenizer_config.json", "preprocessor_config.json"])
def test_missing_file_is_named(copied, config, name):
    (copied / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        Processor(copied, config)


def test_chat_template_in_either_place(copied, config, processor):
    """In its own file, or in the tokenizer's settings; without both it is missing."""
    (copied / "chat_template.json").unlink()
    assert Processor(copied, config).chat("<image>?", 1) == processor.chat("<image>?", 1)
    path = copied / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["chat_template"]
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"chat_template\.json is missing"):
        Processor(copied, config)


def test_stop_ids_without_generation_config(copied, config):
    path = copied / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 7}))
    assert Processor(copied, config).stop_ids == (7,)
    path.unlink()
    assert Processor(copied, config).stop_ids == (config.eos_token_id,)


def test_responses_end_with_the_end_token(processor, config):
    ids = processor.encode_response("<think>left</think> \\boxed{2}")
    assert ids.dtype == np.int32 and ids[-1] == config.eos_token_id
    assert processor.decode(ids) == "<think>left</think> \\boxed{2}"


def test_padding_of_responses():
    tokens, length = pad_responses(
        [[np.array([4, 5]), np.array([6])], [np.array([7, 8, 9])] * 2], 3
    )
    assert tokens.tolist() == [[[4, 5, 0], [6, 0, 0]], [[7, 8, 9], [7, 8, 9]]]
    assert length.tolist() == [[2, 1], [3, 3]]


def test_the_processor_of_transformers_5(shared: Path, tmp_path: Path):
    """`processor_config.json` has both parts, and comes before files of earlier versions."""
    field = shared / "field" / "model_configs" / "transformers_5.24_processor"
    if not field.is_dir():
        pytest.skip(f"{field} is missing")
    for path in (*(shared / "qwen2_5_vl").glob("*.*"), field / "processor_config.json"):
        shutil.copy(path, tmp_path)
    shutil.copy(shared / "qwen2_5_vl" / "3b" / "config.json", tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    config = read_config(tmp_path)
    processor = Processor(tmp_path, config)
    assert processor.grid(1000, 1000) == (1, 16, 16)  # its images have at most 224x224 pixels
    assert processor.video_grid(2, 1000, 1000)[1] > 16  # its videos more
    source = dataclasses.replace(open_model("tiny"), files=tmp_path)
    (tmp_path / "out").mkdir()
    copy_files(source, tmp_path / "out")
    assert not (tmp_path / "out" / "processor_config.json").exists()  # versions before 5 fail at it
    again = Processor(tmp_path / "out", config)
    assert again.grid(1000, 1000) == (1, 16, 16)
    assert again.video_grid(2, 1000, 1000) == processor.video_grid(2, 1000, 1000)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The tiny model's files, to be changed."""
    copy_files(open_model("tiny"), tmp_path)
    shutil.copy(TINY / "config.json", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, "default"), ([], "default"), (7, (7,)), ([7, 9], (7, 9))],
)
def test_the_end_token_of_the_config_stands_in_for_a_missing_one(tiny: Path, given, expected):
    config = open_model("tiny").config
    (tiny / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    expected = (config.eos_token_id,) if expected == "default" else expected
    assert Processor(tiny, config).stop_ids == expected


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("generation_config", {"eos_token_id": -1}, r"\(eos_token_id is -1, expected a whole"),
        ("generation_config", {"eos_token_id": 798}, "expected a whole number.* below 798"),
        ("generation_config", {"eos_token_id": [7, "a"]}, r'\(eos_token_id is \[7, "a"\]'),
        ("generation_config", {"eos_token_id": "7"}, "expected a whole number"),
        ("preprocessor_config", {"min_pixels": "3136"}, r'\(min_pixels is "3136"'),
        ("preprocessor_config", {"min_pixels": 10**9}, "at least 1 and at most 67,108,864"),
        ("preprocessor_config", {"size": 7}, r"\(size is 7, expected an object"),
        ("preprocessor_config", {"image_mean": [0.5, 0.5]}, "expected a list of 3"),
        ("preprocessor_config", {"image_std": [0.25, "a", 1]}, "expected a number"),
        ("preprocessor_config", {"resample": 9}, r"\(resample is 9"),
        ("preprocessor_config", {"do_resize": 1}, r"\(do_resize is 1, expected true or false"),
        ("preprocessor_config", {"do_resize": False}, "sets do_resize to False, which is not"),
        ("tokenizer_config", {"model_max_length": "7"}, "the tokenizer in .* cannot be read"),
        ("chat_template", {"chat_template": 7}, r"\(chat_template is 7, expected text"),
        ("chat_template", {"chat_template": "{{ 1 / 0 }}"}, r"json fails \(division by zero\)"),
        ("chat_template", {"chat_template": "{{"}, "the chat template in .* fails"),
        ("chat_template", {"chat_template": "{{ 'x' * 10**6 }}"}, "adds 999,988 characters"),
        ("chat_template", {"chat_template": "Hello"}, "does not make a chat with an image"),
    ],
)
def test_wrong_values_in_the_folder_are_named(tiny: Path, name: str, values: dict, message: str):
    path = tiny / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(UserError, match=message):
        Processor(tiny, read_config(tiny))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "vocab.json"])
def test_a_damaged_tokenizer_file_is_named(tiny: Path, name: str):
    (tiny / name).write_text("[]")
    with pytest.raises(UserError, match=f"{name} holds no JSON object"):
        Processor(tiny, open_model("tiny").config)

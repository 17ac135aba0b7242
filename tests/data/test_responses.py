"""Responses come back from their tokens with the tags of the thought, whatever the folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from spatial_ssrl_jax.checkpoint.models import TINY, open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import RewardSettings
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.rl.scorer import make_scorer
from spatial_ssrl_jax.tasks import TASKS
from spatial_ssrl_jax.tasks.example import Example
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT, response_text
from spatial_ssrl_jax.trainer.reward_check import check_reward

RIGHT = response_text("It is 4.", "4")
EXAMPLE = Example("flip", "x", (), "?", "4", "It is 4.", {}, {"record": "a.png"})


def folder_of(path: Path, special: bool, opening: str) -> Processor:
    """The tiny model's, perhaps with special tags and a template that opens the thought."""
    model = open_model(TINY)
    shutil.copytree(model.files, path)
    tokens = path / "tokenizer_config.json"
    settings = json.loads(tokens.read_text())
    if special:
        used = max(map(int, settings["added_tokens_decoder"]))
        first = settings["added_tokens_decoder"][str(used)]
        for number, tag in enumerate(("<think>", "</think>"), 1):
            settings["added_tokens_decoder"][str(used + number)] = first | {
                "content": tag,
                "special": True,
            }
    tokens.write_text(json.dumps(settings))
    template = path / "chat_template.json"
    text = json.loads(template.read_text())["chat_template"]
    start = "<|im_start|>assistant\n"
    at = text.rindex(start)
    end = at + len(start)
    opened = text[:end] + opening + text[end:]
    template.write_text(json.dumps({"chat_template": opened}))
    return Processor(path, model.config)


@pytest.mark.parametrize("opening", ["", "<think>\n", "<think>", "<think>\n\n</think>\n\n"])
@pytest.mark.parametrize("special", [False, True])
def test_a_right_response_is_right_after_its_tokens(tmp_path: Path, special: bool, opening: str):
    processor = folder_of(tmp_path / "model", special, opening)
    prompt, _ = processor.chat("?", 0)
    assert prompt.endswith("assistant\n" + opening)
    ids = processor.encode_response(RIGHT)
    text = processor.decode(ids)
    is_open = bool(opening) and "</think>" not in opening
    assert text.replace("<think>\n", "<think>") == RIGHT
    kept = processor.tokenizer.decode(ids[:-1].tolist())
    assert kept.startswith("<think>") == (not is_open)  # it is not learnt twice
    check_reward(EXAMPLE, processor, make_scorer(RewardSettings()))


def test_special_tokens_are_dropped(tmp_path: Path):
    processor = folder_of(tmp_path / "model", True, "")
    ids = np.concatenate([processor.encode_response("a"), processor.encode_response("<think>b")])
    assert processor.decode(ids) == "a<think>b"


def test_a_rule_that_no_right_answer_meets_is_refused(tmp_path: Path):
    processor = folder_of(tmp_path / "model", False, "")
    scorer = make_scorer(RewardSettings(rule="choice"))
    with pytest.raises(UserError, match="the rule choice does not accept the answer of a right"):
        check_reward(EXAMPLE, processor, scorer)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_what_the_tiny_models_questions_share_is_a_token(task):
    """Questions are short, and they and their responses come back from their tokens."""
    model = open_model(TINY)
    processor, source = Processor(model.files, model.config), open_source("scenes:8")
    for number in range(8):
        example = task.make(source[number], np.random.default_rng(number), task.settings())
        question, response = (
            f"{example.question} {FORMAT_PROMPT}",
            response_text(example.reason, example.answer),
        )
        ids = processor.tokenizer(question)["input_ids"]
        assert len(ids) <= 30 and processor.tokenizer.decode(ids) == question
        ids = processor.encode_response(response)
        assert len(ids) <= 48 and processor.decode(ids) == response

"""Makes `assets/tiny`: the tiny model's config, tokenizer and processor files, in the Hub's format.

    python -m spatial_ssrl_jax.assets.make_tiny

The tokenizer is a byte-level BPE in Qwen2's file format, trained on the project's own questions
and SFT responses: about one token a word. Sentences that come again in a task's questions are added
tokens, one each, so that little is computed for what hardly changes.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from spatial_ssrl_jax.data.sources.scenes import open_scenes
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig, TextConfig
from spatial_ssrl_jax.qwen_vl.family import config_to_dict
from spatial_ssrl_jax.qwen_vl.qwen2_5 import MODEL_TYPE, Qwen2_5VisionConfig
from spatial_ssrl_jax.tasks import TASKS
from spatial_ssrl_jax.tasks.example import Example, Reject
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT, response_text

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCAB = 1024
_SYSTEM = "You are a helpful assistant."
_MARKS = ("<think>", "</think>", "\\boxed{")  # of every response
_COMMON = 0.02  # of a task's questions that have a sentence, for it to be a token
_SPLIT = (  # how Qwen2 splits text before merging: words with their space, single digits, signs
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Between sentences, and where an option or an image begins.
_SENTENCES = re.compile(r"(?<=[.?>]) (?=[A-Z])|(?= ?<image\d>)|(?<=<image\d>)|(?= [A-D]\. [A-Z])")
_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\n" + _SYSTEM + "<|im_end|>\n{% endif %}"
    "{%- for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{%- if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def examples(count: int = 300) -> Iterator[Example]:
    """Examples of every task over synthetic scenes."""
    source = open_scenes("scenes", "")
    for number in range(count):
        rng = np.random.default_rng(number)
        for task in TASKS:
            with suppress(Reject):
                yield task.make(source[number], rng, task.settings())


def corpus(drawn: Sequence[Example]) -> Iterator[str]:
    """Their questions and responses."""
    for example in drawn:
        yield f"{example.question} {FORMAT_PROMPT}"
        yield response_text(example.reason, example.answer)
    yield f"system\n{_SYSTEM}\nuser\nassistant\n"


def common_sentences(drawn: Sequence[Example]) -> list[str]:
    """Sentences that at least `_COMMON` of a task's questions have, in order of their length."""
    by_task: dict[str, list[str]] = {}
    for example in drawn:
        by_task.setdefault(example.task, []).append(example.question)
    found = {FORMAT_PROMPT, _SYSTEM}
    for questions in by_task.values():
        counts = Counter(part for text in questions for part in set(_SENTENCES.split(text)))
        common = (part for part, n in counts.items() if n >= _COMMON * len(questions))
        found.update(part for part in common if len(part.split()) > 2 and "<image" not in part)
    return sorted(found, key=lambda text: (len(text), text))


def tiny_config(tokens: int) -> QwenVLConfig:
    """A Qwen2.5-VL of 2,228,352 parameters whose special tokens end a vocabulary of `tokens`."""
    ids = {name: tokens - len(SPECIAL) + i for i, name in enumerate(SPECIAL)}
    return QwenVLConfig(
        model_type=MODEL_TYPE,
        text=TextConfig(
            vocab_size=tokens,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            mrope_section=(4, 6, 6),
            max_position_embeddings=4096,
        ),
        vision=Qwen2_5VisionConfig(
            depth=4,
            hidden_size=128,
            intermediate_size=384,
            num_heads=4,
            out_hidden_size=128,
            fullatt_block_indexes=(3,),
        ),
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
    )


def make(folder: Path) -> None:
    """Writes every file of the tiny model's folder but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    drawn = [*examples()]
    tokenizer.train_from_iterator(corpus(drawn), trainer)
    tokenizer.model.save(str(folder))
    names = [*common_sentences(drawn), *_MARKS, *SPECIAL]
    first = tokenizer.get_vocab_size()
    config = tiny_config(first + len(names))
    added = {
        str(first + i): {
            "content": name,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": name in SPECIAL,
        }
        for i, name in enumerate(names)
    }
    files = {
        "config.json": config_to_dict(config, "float32"),
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "additional_special_tokens": list(SPECIAL[1:]),
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "model_max_length": 4096,
            "errors": "replace",
            "clean_up_tokenization_spaces": False,
        },
        "chat_template.json": {"chat_template": _TEMPLATE},
        "preprocessor_config.json": {
            "min_pixels": 28 * 28,
            "max_pixels": 112 * 112,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.25, 0.25, 0.25],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
        "generation_config.json": {
            "bos_token_id": config.bos_token_id,
            "pad_token_id": config.bos_token_id,
            "eos_token_id": [config.eos_token_id, config.bos_token_id],
            "do_sample": False,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    make(Path(__file__).parent / "tiny")

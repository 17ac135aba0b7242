"""The exact prompts, in every style of every benchmark."""

import hashlib
from pathlib import Path

import pytest

from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.eval.benchmarks.prompts import QSPATIAL
from spatial_ssrl_jax.eval.benchmarks.registry import SPECS, open_benchmark
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT
from tests.helpers import benchmark_files as files

KIT = (
    "Question: What is 1?\nOptions:\nA. chair\nB. table\n"
    "Please select the correct answer from the options above. \n"
)
LETTER = "\nThe final answer should be the option letter from the given choices.\n"
VSI = "Watch the given video and anser the following question.\n\n"
SPATIAL457 = (
    "You are an intelligent chatbot designed to answer questions based on an image. Your task is "
    "to analyze the images, identify attributes of multiple objects and their occlusion "
    "relationships, and then determine the answer to the question.\n<image>Is there?First, you "
    "should identify the related objects refered in the questions"
)
# Benchmark: which question, asked directly, asked to reason.
ASKED = {
    "spatial457": (3, "Is there? Please directly give the answer.", None),
    "3dsrbench": (0, KIT.replace("1", "0"), KIT.replace("1", "0") + FORMAT_PROMPT),
    "spatialeval": (1, "Hint: Look.\n" + KIT, "Hint: Look.\n" + KIT + FORMAT_PROMPT),
    "qspatial_plus": (
        0,
        QSPATIAL + "Question: How far is 0?",
        QSPATIAL + "Question: How far is 0?\nLet's thinkg step by step and start by finding good "
        "reference objects or object parts in the image.",
    ),
    "whatsup": (
        0,
        "Based on the image, choose the correct option from the list below. Only respond the "
        "corresponding letter (e.g., C).\n\n{captions}",
        "Based on the image, choose the correct option from the list below.\n\n{captions}\n"
        + FORMAT_PROMPT,
    ),
    "viewspatial": (
        0,
        "Where is 0?\nA. right\nB. left\nReply only to the corresponding option.\nAnswer:",
        "Where is 0?\nA. right\nB. left" + LETTER + FORMAT_PROMPT,
    ),
    "vsi_bench": (
        1,
        VSI + "Where?\nA. left\nB. right\n"
        "Answer directly with the option letter from the given choices.",
        VSI + "Where?\nA. left\nB. right" + LETTER + FORMAT_PROMPT,
    ),
    "mmbench": (0, KIT.replace("1", "241"), KIT.replace("1", "241") + FORMAT_PROMPT),
    "blink": (1, KIT, KIT + FORMAT_PROMPT),
    "hallusionbench": (0, "Is it so?", "Is it so? " + FORMAT_PROMPT),
    "realworldqa": (1, "Hint: Look.\n" + KIT, "Hint: Look.\n" + KIT + FORMAT_PROMPT),
    "ocrbench": (
        0,
        "what is written in the image?",
        "what is written in the image? " + FORMAT_PROMPT,
    ),
    "chartqa": (
        0,
        "How much is 0?\nAnswer the question using a single word or phrase.",
        "How much is 0?\nAnswer the question using a single word or phrase. " + FORMAT_PROMPT,
    ),
    "seedbench2_plus": (1, "Hint: Look.\n" + KIT, "Hint: Look.\n" + KIT + FORMAT_PROMPT),
}


@pytest.fixture(scope="module")
def processor() -> Processor:
    tiny = open_model("tiny")
    return Processor(tiny.files, tiny.config)


@pytest.mark.parametrize("name", SPECS)
def test_each_style_to_the_letter(name: str, tmp_path: Path):
    benchmark = open_benchmark(name, files.WRITERS[name](tmp_path))
    index, direct, reasoning = ASKED[name]
    question = benchmark.questions[index]
    captions = "\n".join(f"{k}: {text}" for k, text in question.options.items())
    assert benchmark.prompt(question).text == direct.replace("{captions}", captions)
    if reasoning is not None:
        for style in ("reasoning", "own"):
            prompt = benchmark.prompt(question, style)
            assert prompt.text == reasoning.replace("{captions}", captions)
            assert (prompt.images, prompt.video) == (question.images, question.video)


def test_spatial457_reasons_in_steps(tmp_path: Path):
    """In its own style it asks for its JSON, in ours for a box, once."""
    benchmark = open_benchmark("spatial457", files.write_spatial457(tmp_path))
    own, ours = (benchmark.prompt(benchmark.questions[3], s).text for s in ("own", "reasoning"))
    assert own.startswith(SPATIAL457) and ours.startswith(SPATIAL457)
    assert own.endswith("template: {'Reasoning': '<your reasons>', 'Answer': '<Your answer>'}")
    assert ours.endswith("fits the question.\n\n" + FORMAT_PROMPT)
    assert ours.count(FORMAT_PROMPT) == 1 and FORMAT_PROMPT not in own


def test_numbers_of_vsi_bench_are_asked_as_numbers(tmp_path: Path):
    benchmark = open_benchmark("vsi_bench", files.write_vsi(tmp_path))
    direct, reasoning = (
        benchmark.prompt(benchmark.questions[0], style).text for style in ("direct", "reasoning")
    )
    assert direct == f"{VSI}How many?\nAnswer directly with a number(integer or decimal)."
    last = "\nThe final answer should be a number(integer or decimal).\n"
    assert reasoning == f"{VSI}How many?{last}{FORMAT_PROMPT}"


def test_formulas_are_asked_directly_in_a_reasoning_run(tmp_path: Path):
    benchmark = open_benchmark("ocrbench", files.write_ocrbench(tmp_path))
    text = benchmark.prompt(benchmark.questions[2], "reasoning").text
    assert text == "what is written in the image? Please directly give the answer."


def test_the_words_of_qspatial_are_the_published_ones():
    """By the hash that the benchmark's template is known to have."""
    digest = hashlib.sha256(QSPATIAL.removesuffix("\n").encode()).hexdigest()
    assert digest == "b3da32feb428a7840ecaf1d08ef095b9cd72ff6ef34d5b2b05ec1c1599bb613c"


@pytest.mark.parametrize("name", [name for name in SPECS if name != "vsi_bench"])
def test_a_model_can_be_asked(name: str, tmp_path: Path, processor: Processor):
    """Every prompt has a mark for each of its images, in their order."""
    benchmark = open_benchmark(name, files.WRITERS[name](tmp_path))
    for style in ("direct", "reasoning", "own"):
        prompt = benchmark.prompt(benchmark.questions[0], style)
        images = [image.open() for image in prompt.images]
        text, order = processor.chat(prompt.text, len(images))
        assert order == [("image", i) for i in range(len(images))]
        assert "<image>" not in text and text.count("<|image_pad|>") == len(images)


def test_the_published_settings():
    pixels = {name: spec.pixels for name, spec in SPECS.items()}
    kit = (1280 * 784, 16384 * 784)
    assert pixels.pop("ocrbench") == (100 * 784, 16384 * 784)
    assert pixels.pop("whatsup")[1] == 512 * 784
    assert pixels.pop("vsi_bench") == (128 * 784, 768 * 784)
    assert pixels.pop("viewspatial") == (256 * 784, 1280 * 784)
    assert set(pixels.values()) == {kit}
    assert [name for name, spec in SPECS.items() if spec.frames] == ["vsi_bench"]
    tokens = {name for name, spec in SPECS.items() if spec.new_tokens == 4096}
    assert tokens == {"whatsup", "viewspatial", "vsi_bench"}

"""The exact prompts, in every style of every benchmark."""

import hashlib
from pathlib import Path

import pytest

from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.eval.benchmarks.prompts import (
    QSPATIAL,
    SPATIAL457_LEVELS,
    SPATIAL457_PROMPT,
    SPATIAL457_STEPS,
)
from spatial_ssrl_jax.eval.benchmarks.registry import SPECS, Benchmark, open_benchmark
from spatial_ssrl_jax.eval.questions import unscored_prediction
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
    "relationships, and then determine the answer to the question.\n{}<image>Is there?{}"
    f"{SPATIAL457_STEPS}{{}}"
)
DIRECTLY = "Please directly give the answer."
# Benchmark: which question, asked directly, asked to reason.
ASKED = {
    "spatial457": (3, SPATIAL457.format("", "", DIRECTLY), None),
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
    "hallusionbench": (0, "Is it so?", "Is it so?" + FORMAT_PROMPT),
    "realworldqa": (1, "Hint: Look.\n" + KIT, "Hint: Look.\n" + KIT + FORMAT_PROMPT),
    "ocrbench": (
        0,
        "what is written in the image?",
        "what is written in the image?" + FORMAT_PROMPT,
    ),
    "chartqa": (
        0,
        "How much is 0?\nAnswer the question using a single word or phrase.",
        "How much is 0?\nAnswer the question using a single word or phrase." + FORMAT_PROMPT,
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


def test_spatial457_asks_for_its_json_or_for_a_box(tmp_path: Path):
    benchmark = open_benchmark("spatial457", files.write_spatial457(tmp_path))
    own, ours = (benchmark.prompt(benchmark.questions[3], s).text for s in ("own", "reasoning"))
    assert ours == SPATIAL457.format("", "", FORMAT_PROMPT)
    assert own == SPATIAL457.format(
        "",
        "",
        "Write your response into this json template: {'Reasoning': '<your reasons>', 'Answer': "
        "'<Your answer>'}",
    )


def test_the_words_of_spatial457_are_the_released_ones():
    """By the hashes of the released code's instructions, those before all levels joined."""
    levels = "".join(SPATIAL457_PROMPT.format(what=what) for what in SPATIAL457_LEVELS.values())
    assert [hashlib.sha256(text.encode()).hexdigest() for text in (levels, SPATIAL457_STEPS)] == [
        "57181d2e6836ff386a8311aee77630cc67bb427d8d4be3f3622039214bc24645",
        "78df29391bacf6a74b7cc64349631b80d34424cb3ac000e9609c79ffcf7362de",
    ]


# As the released code asks: benchmark, which question, style, text.
RELEASED = (
    ("spatial457", 3, "direct", SPATIAL457.format(*[DIRECTLY] * 3)),
    ("spatial457", 3, "reasoning", SPATIAL457.format(*[FORMAT_PROMPT] * 3)),
    (
        "vsi_bench",
        1,
        "direct",
        VSI + "Where?A. A. leftB. B. right\n"
        "Answer directly with the option letter from the given choices.",
    ),
    ("vsi_bench", 1, "reasoning", VSI + "Where?A. A. leftB. B. right" + LETTER + FORMAT_PROMPT),
)


@pytest.mark.parametrize(("name", "index", "style", "text"), RELEASED)
def test_the_papers_prompts_to_the_letter(name: str, index: int, style, text: str, tmp_path: Path):
    benchmark = open_benchmark(name, files.WRITERS[name](tmp_path), as_released=True)
    assert benchmark.prompt(benchmark.questions[index], style).text == text


@pytest.mark.parametrize(
    "name", [name for name in SPECS if name not in ("spatial457", "vsi_bench")]
)
def test_the_papers_prompts_of_the_others_are_the_same(name: str, tmp_path: Path):
    path = files.WRITERS[name](tmp_path)
    plain, paper = (open_benchmark(name, path, as_released=known) for known in (False, True))
    for style in ("direct", "reasoning", "own"):
        prompts = [[b.prompt(q, style).text for q in b.questions] for b in (plain, paper)]
        assert prompts[0] == prompts[1]


def kit_file(name: str, folder: Path, **cells: str) -> Path:
    """One question of a benchmark of VLMEvalKit, in which D is right."""
    more = {"C": "stool", "D": "lamp", "qid": "ABCDEF00", **cells}
    (file,) = SPECS[name].files
    return files.write_tsv(folder / file[0], [files.mcq_row(1, "D", **more)])


def options_of(benchmark: Benchmark) -> str:
    return "".join(benchmark.questions[0].options)


# Of pandas 2.3, which the released code requires; each to the letter.
MISSING = (
    "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>",
    "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
)  # fmt: skip
PRESENT = ("none", "NONE", "None ", " None", "None of these", "N/A.", "Nan", "na", "0", "False")


@pytest.mark.parametrize("cell", MISSING)
def test_cells_that_pandas_misses_are_dropped_in_the_papers_prompts_alone(
    cell: str, tmp_path: Path
):
    path = kit_file("blink", tmp_path, B=cell, hint=cell)
    plain, paper = (open_benchmark("blink", path, as_released=known) for known in (False, True))
    assert (options_of(plain), options_of(paper)) == ("ABCD", "ACD")
    assert plain.questions[0].meta == {} and paper.questions[0].meta == {"dropped": "B"}
    asked = [b.prompt(b.questions[0]).text for b in (plain, paper)]
    assert f"Hint: {cell}\n" in asked[0] and f"B. {cell}\n" in asked[0]
    assert asked[1] == (
        "Question: What is 1?\nOptions:\nA. chair\nC. stool\nD. lamp\n"
        "Please select the correct answer from the options above. \n"
    )


@pytest.mark.parametrize("cell", PRESENT)
def test_other_cells_are_kept(cell: str, tmp_path: Path):
    benchmark = open_benchmark(
        "blink", kit_file("blink", tmp_path, B=cell, hint=cell), as_released=True
    )
    assert options_of(benchmark) == "ABCD" and benchmark.questions[0].hint == cell
    assert benchmark.questions[0].meta == {}


@pytest.mark.parametrize(
    "name", ["3dsrbench", "spatialeval", "mmbench", "blink", "realworldqa", "seedbench2_plus"]
)
def test_every_benchmark_of_the_kit_drops_them(name: str, tmp_path: Path):
    path = kit_file(name, tmp_path, B="None")
    assert options_of(open_benchmark(name, path)) == "ABCD"
    assert options_of(open_benchmark(name, path, as_released=True)) == "ACD"


def test_where_the_right_option_is_dropped_no_answer_is_right(tmp_path: Path):
    """The released code looks for the letters of the options that are left alone."""
    benchmark = open_benchmark("blink", kit_file("blink", tmp_path, D="None"), as_released=True)
    (question,) = benchmark.questions
    for response, extracted in (
        ("A", "A"),
        ("D", None),
        (r"\boxed{D. None}", None),
        ("None", None),
    ):
        given = unscored_prediction(question, benchmark.prompt(question), response)
        (found,), scores = benchmark.score([given])
        assert (found.extracted, found.score, scores.score) == (extracted, 0, 0)


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
    assert text == "what is written in the image?Please directly give the answer."


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

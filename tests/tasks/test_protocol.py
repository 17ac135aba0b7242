"""Questions and responses against strings typed out in full."""

import re

import numpy as np
import pytest

from spatial_ssrl_jax.tasks import TASKS_BY_NAME
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT, response_text
from tests.helpers.images import record

CLUES = "Based on visual clues such as continuity, alignment, and context, answer the correct "
SHUFFLE = {
    "2x2": "The image has been divided into 4 shuffled patches labeled 0, 1, 2, and 3. "
    + CLUES
    + "arrangement of the patches to restore the original image, where the format is "
    "'TopLeft-TopRight-BottomLeft-BottomRight'.",
    "2x2_masked": "The image has been divided into 4 shuffled patches labeled 0, 1, 2, and 3. One "
    "of the four patches is masked completely by white pixels. "
    + CLUES
    + "arrangement of the patches to restore the original image, where the format is "
    "'TopLeft-TopRight-BottomLeft-BottomRight'.",
    "1x3": "The image has been divided into 3 shuffled horizontal strips labeled 0, 1, and 2. "
    + CLUES
    + "arrangement of the strips to restore the original image, where the format is "
    "'Left-Middle-Right'.",
    "1x4": "The image has been divided into 4 shuffled horizontal strips labeled 0, 1, 2, and 3. "
    + CLUES
    + "arrangement of the strips to restore the original image, where the format is "
    "'Left-Middle1-Middle2-Right'.",
    "3x1": "The image has been divided into 3 shuffled vertical strips labeled 0, 1, and 2. "
    + CLUES
    + "arrangement of the strips to restore the original image, where the format is "
    "'Top-Middle-Bottom'.",
    "4x1": "The image has been divided into 4 shuffled vertical strips labeled 0, 1, 2, and 3. "
    + CLUES
    + "arrangement of the strips to restore the original image, where the format is "
    "'Top-Middle1-Middle2-Bottom'.",
    "3x3": "The image has been divided into 9 shuffled patches labeled 0, 1, 2, 3, 4, 5, 6, 7, and "
    "8. " + CLUES + "arrangement of the patches to restore the original image, where the format is "
    "'TopLeft-Top-TopRight-Left-Middle-Right-BottomLeft-Bottom-BottomRight'.",
}
FLIP = (
    "The image has been divided into 4 labeled 0, 1, 2, and 3. One of the four patches is flipped "
    "either horizontally or vertically. Based on visual clues such as continuity, alignment, and "
    "context, answer the correct patch that is flipped and the direction the flip, where the "
    "format is 'Label-Direction'. The direction can only be 0(flipped vertically) or 1(flipped "
    "horizontally)."
)
CROP = (
    "Which image is the missing part in the first image <image1>? Based on visual clues such as "
    "alignment, image content, and positional relationship, select one of the four options "
    "<image2><image3><image4><image5> as the final answer. The final answer should be chosen from "
    "'A', 'B', 'C', and 'D'."
)
DEPTH = (
    "The original image has three regions marked as 1, 2, and 3. Consider the content, positional "
    "relationships, depths of the three regions and other cues, and sort the depths of the three "
    "regions from smallest to largest from the camera, where the format of the answer is "
    "'Smallest-Middle-Largest'."
)
POSITION = (
    "I've taken an image and there are two regions marked as 1, and 2 on the image. Assume that "
    "there is a camera at position '2' and it's facing HEADING. According to the camera, where is "
    "the region marker '1'? A. X B. X C. X D. X. Consider cues such as depth, orientation, and 3D "
    "spatial relationshipTAIL. The final answer should be chosen from 'A', 'B', 'C', and 'D'."
)
TAIL = " and ignore the height difference between the two regions"


def question(name, seed=0, **changes):
    task = TASKS_BY_NAME[name]
    return task.make(record(6), np.random.default_rng(seed), task.settings(**changes)).question


@pytest.mark.parametrize("kind", SHUFFLE)
def test_shuffle(kind):
    assert question("shuffle", kinds={kind: 1.0}) == SHUFFLE[kind]


@pytest.mark.parametrize(("name", "text"), [("flip", FLIP), ("crop", CROP), ("depth", DEPTH)])
def test_one_question_tasks(name, text):
    assert {question(name, seed) for seed in range(5)} == {text}


@pytest.mark.parametrize("kind", ["near", "far_single", "far_combined"])
@pytest.mark.parametrize(
    ("heading", "words"),
    [
        ("left", "to the left of the image"),
        ("right", "to the right of the image"),
        ("towards", "to me"),
        ("away", "to away from me"),
    ],
)
def test_position(kind, heading, words):
    drawn = (question("position", s, kinds={kind: 1.0}, headings={heading: 1.0}) for s in range(20))
    text = next(q for q in drawn if "position '2'" in q)
    options = r"(Left|Right|Front|Back)(-(Front|Back))?"
    text = re.sub(rf"([A-D])\. {options}(?=[ .])", r"\1. X", text)
    tail = "" if kind == "near" else TAIL
    assert text == POSITION.replace("HEADING", words).replace("TAIL", tail)


def test_format_prompt_and_response():
    assert FORMAT_PROMPT == (
        "You FIRST think about the reasoning process as an internal monologue and then provide "
        "the final answer. The reasoning process MUST BE enclosed within <think> </think> tags. "
        "The final answer MUST BE put in \\boxed{}."
    )
    assert response_text("Because.", "1-2") == "<think>Because.</think>\\boxed{1-2}"

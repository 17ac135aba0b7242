"""The benchmarks' prompts, character by character; each family's file combines them.

Scores are comparable only with these strings, misspellings included. With reasoning, the training
format prompt of `tasks/protocol.py` comes last, once, and as in the released code without a space
in front.
"""

from typing import Literal

from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT

# How a question is asked: "direct" by the benchmark's own prompt; "reasoning" with the training
# format prompt; "own" by the reasoning prompt of the benchmark itself, where it has one (the paper
# asks untrained models so on Spatial457), else as "reasoning".
Style = Literal["direct", "reasoning", "own"]

# VLMEvalKit's multiple choice: 3DSRBench, SpatialEval, BLINK, RealWorldQA, SEEDBench2-Plus and
# MMBench.
HINT = "Hint: {hint}\n"
QUESTION = "Question: {question}\n"
OPTIONS = "Options:\n"
OPTION = "{letter}. {text}\n"
SELECT = "Please select the correct answer from the options above. \n"

CHARTQA_PROMPT = "\nAnswer the question using a single word or phrase."

# Spatial457 and the formulas of OCRBench, which are too long for a box.
DIRECTLY = "Please directly give the answer."

WHATSUP_PROMPT = "Based on the image, choose the correct option from the list below."
WHATSUP_DIRECT = f"{WHATSUP_PROMPT} Only respond the corresponding letter (e.g., C).\n\n"
WHATSUP_OPTION = "{letter}: {text}"

VIEWSPATIAL_DIRECT = "\nReply only to the corresponding option.\nAnswer:"
LETTER_LAST = "\nThe final answer should be the option letter from the given choices.\n"

VSI = "Watch the given video and anser the following question.\n\n"
VSI_OPTION = "\n{letter}. {text}"
VSI_OPTION_AS_RELEASED = "{letter}. {letter}. {text}"  # the file's options have their letters
VSI_NUMBER_DIRECT = "\nAnswer directly with a number(integer or decimal)."
VSI_LETTER_DIRECT = "\nAnswer directly with the option letter from the given choices."
VSI_NUMBER_LAST = "\nThe final answer should be a number(integer or decimal).\n"

QSPATIAL = (
    "You will be provided with a question and a 2D image. The question involves measuring the "
    "precise distance in 3D space through a 2D image. You will answer the question by providing a "
    "numeric answer consisting of a scalar and a distance unit in the format of "
    '"""\\scalar{scalar} \\distance_unit{distance unit}""" at the end of your response.\n'
)
QSPATIAL_DIRECT = "Question: {question}"
QSPATIAL_REASONING = (
    "Question: {question}\nLet's thinkg step by step and start by finding good reference objects "
    "or object parts in the image."
)

SPATIAL457_PROMPT = (
    "You are an intelligent chatbot designed to answer questions based on an image. Your task is "
    "to analyze the images, identify attributes of {what}, and then determine the answer to the "
    "question.\n"
)
SPATIAL457_LEVELS = {
    "L1_single": "the objects",
    "L2_objects": "multiple objects",
    "L3_2d_spatial": (
        "multiple objects and their spatial relationship from 2D projected camera view"
    ),
    "L4_occ": "multiple objects and their occlusion relationships",
    "L4_pose": ("multiple objects and their facing direction in 3D space from the camera view"),
    "L5_6d_spatial": (
        "multiple objects and their spatial relationship from objects’ perspective in 3D space"
    ),
    "L5_collision": (
        "multiple objects and their potential collision given the assumption of moving direction "
        "in 3D space"
    ),
}
SPATIAL457_STEPS = (
    "First, you should identify the related objects refered in the questions, including their "
    "shape, color, size; then add a brief reasoning process about the questions. Each object in "
    "the image has a shape (e.g., 'airliner'), a size (only can be 'small' or 'large'), a color "
    "(e.g. 'blue'). The size of the object is either 'small' or 'large'. The color of the "
    "object is one of the following: 'gray', 'blue', 'purple', 'brown', 'green', 'cyan', 'red', "
    "'yellow'. The direction of the object is one of the following: 'left', 'right', 'front', "
    "'back'.\n\n"
    "Second, give the answer based on the reasoning process. The answer should only be (1) a "
    "phrase chosen from the following options: Small, Large, Airliner, Dirtbike, Road bike, "
    "Tandem bike, Suv, Wagon, Scooter, Mountain bike, Minivan, Sedan, School bus, Fighter, "
    "Chopper, Double bus, Truck, Articulated bus, Cruiser, Jet, Utility bike, Regular bus, "
    "Biplane, Gray, Blue, Purple, Brown, Green, Cyan, Red, Yellow, Left, Right, Front, Back, or "
    "(2) an integer [0-10] when asked for 'How many' or 'What is the number of', or (3) 'Yes' "
    "or 'No' when asked for 'Is there'. If you think there are no possible answers or the "
    "question is not clear, choose the best answer that fits the question.\n\n"
)
SPATIAL457_JSON = (
    "Write your response into this json template: {'Reasoning': '<your reasons>', 'Answer': "
    "'<Your answer>'}"
)


def in_style(text: str, style: Style, tail: str = FORMAT_PROMPT) -> str:
    """A benchmark's own prompt, followed by `tail` unless it is asked directly."""
    return text if style == "direct" else text + tail

"""Prompt and response strings that all tasks share; each task's questions are in its file."""

FORMAT_PROMPT = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the "
    "final answer. The reasoning process MUST BE enclosed within <think> </think> tags. The final "
    "answer MUST BE put in \\boxed{}."
)


def response_text(reason: str, answer: str) -> str:
    """A response in the required format, as SFT teaches it."""
    return f"<think>{reason}</think>\\boxed{{{answer}}}"

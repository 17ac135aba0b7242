"""Placeholders in a question, `<image>`, `<image2>` and `<video>`: where images and videos go."""

import re

from spatial_ssrl_jax.common.errors import UserError

_PLACEHOLDER = re.compile(r"<(image|video)(\d*)>")
# An image or video of a prompt: "image" or "video", and its index among those of its kind.
MediaSlot = tuple[str, int]


def chat_content(
    question: str, given: dict[str, int]
) -> tuple[list[dict[str, str]], list[MediaSlot]]:
    """The chat message's content parts, and its images and videos in their order.

    Args:
      question: with or without placeholders; see `Processor.chat`.
      given: number of images and of videos.

    Raises:
      UserError: the placeholders do not match them.
    """
    marks = list(_PLACEHOLDER.finditer(question))
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
        indices = [i for of, i in order if of == kind]
        if sorted(indices) != list(range(count)):
            numbers = ", ".join(str(i + 1) for i in indices) or "none"
            raise UserError(
                f"the question has placeholders for {len(indices)} {kind}s (number {numbers}), "
                f"but {count} were given: give as many as it has placeholders for."
            )
    return content, order

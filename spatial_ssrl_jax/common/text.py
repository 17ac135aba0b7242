"""Text for messages: an error on one line, a value of a file, sizes and durations."""

import json
import re
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def one_line(text: object) -> str:
    """The text with every run of white space as one space."""
    return " ".join(str(text).split())


def printable(text: str) -> str:
    """The text with control characters and what is no Unicode as escapes, such as `\\x1b`.

    Line breaks and tabs stay. What models and files say must not steer a terminal, and a file name
    that is not UTF-8 cannot be printed as it is.
    """
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def error_line(error: BaseException, limit: int = 200) -> str:
    """An error's message on one line without its full stop; its type where it has no message.

    Args:
      error: libraries' messages may be many lines long.
      limit: characters kept.
    """
    return (one_line(error) or type(error).__name__)[:limit].rstrip(" .")


def shown(value: Any, limit: int = 60) -> str:
    """A value of JSON types as JSON writes it, shortened to `limit` characters."""
    try:
        text = json.dumps(value)
    except RecursionError:
        text = "nested too deeply"
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def byte_size(count: float) -> str:
    """Bytes in decimal units with three digits, as `1.23 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def duration(seconds: float) -> str:
    """A long time to the minute, as `2 h 5 min`."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def clock(seconds: float) -> str:
    """A time to the second, as `2:05:07` or `5:07`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def utf8(text: str) -> bytes:
    """Any text as bytes: undecodable bytes of a file's name as they were.

    Other surrogates, which a file's name cannot hold, are encoded by themselves.
    """
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode(errors="surrogatepass")

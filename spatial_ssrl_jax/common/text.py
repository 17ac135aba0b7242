"""Text for messages: an error on one line, sizes and durations."""


def one_line(text: object) -> str:
    """The text with every run of white space as one space."""
    return " ".join(str(text).split())


def error_line(error: BaseException, limit: int = 200) -> str:
    """An error's message on one line without its full stop; its type where it has no message.

    Args:
      error: libraries' messages may be many lines long.
      limit: characters kept.
    """
    return (one_line(error) or type(error).__name__)[:limit].rstrip(" .")


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

"""Reading videos: frames taken evenly from a file, upright 8-bit RGB, with their rate."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.common.text import error_line

FPS, MAX_FRAMES = 2.0, 768  # Qwen2.5-VL's own: frames a second, and frames at most
_FEWEST_FRAMES, _TOGETHER = 4, 2  # at least so many, in multiples of what one patch holds
_UNKNOWN_RATE = 24.0


@dataclass(frozen=True)
class Video:
    """Frames that were taken from a video.

    Attributes:
      frames: [F, H, W, 3] uint8, RGB.
      fps: frames a second among these frames, not in the file.
    """

    frames: np.ndarray
    fps: float


def sample_places(total: int, native: float, fps: float, most: int) -> np.ndarray:
    """Which frames to take, by the rule of Qwen2.5-VL's processor: evenly, an even number.

    Args:
      total: frames in the file.
      native: its frames a second.
      fps: frames a second wanted; four frames at least are taken where there are so many.
      most: frames at most.

    Returns:
      [F] int64 places, rising.
    """
    count = int(min(max(total / native * fps, _FEWEST_FRAMES), most, total))
    count = max(count // _TOGETHER * _TOGETHER, 1)
    return (np.arange(count) * (total / count)).astype(np.int64)


def open_video(path: str | os.PathLike, fps: float = FPS, most: int = MAX_FRAMES) -> Video:
    """Reads a video file with PyAV (the `video` extra).

    Args:
      path: the file; its first video stream is read, turned upright by its display matrix.
      fps, most: see `sample_places`.

    Raises:
      BadPicture: the file is missing, holds no video, or is cut short.
      UserError: PyAV is not installed.
    """
    with _reading(path) as av:
        total, native = _count(av, path)
        places = sample_places(total, native, fps, most)
        with av.open(os.fspath(path)) as container:
            frames = _take(container, places)
    if len(frames) < len(places):
        raise BadImage(f"{path}: only {len(frames)} of {len(places)} frames can be decoded.")
    return Video(np.stack(frames), len(places) / total * native)


def measure_video(
    path: str | os.PathLike, fps: float = FPS, most: int = MAX_FRAMES
) -> tuple[int, int, int]:
    """Frames, height and width that `open_video` would give; one frame is decoded for it.

    Raises:
      as `open_video`, save that damage after the first frame is not noticed.
    """
    with _reading(path) as av:
        places = sample_places(*_count(av, path), fps, most)
        with av.open(os.fspath(path)) as container:
            frames = _take(container, np.zeros(1, np.int64))
    if not frames:
        raise BadImage(f"{path}: no frame can be decoded.")
    return len(places), *frames[0].shape[:2]


@contextmanager
def _reading(path: str | os.PathLike) -> Iterator[ModuleType]:
    """PyAV, and what it raises about a file as sentences."""
    try:
        import av
    except ImportError:
        raise UserError(
            f"{path}: reading videos needs PyAV: pip install 'spatial_ssrl_jax[video]'."
        ) from None
    try:
        yield av
    except FileNotFoundError:
        raise BadImage(f"{path}: there is no such file.") from None
    except (av.FFmpegError, OSError) as error:
        raise BadImage(f"{path}: cannot be read as a video ({error_line(error)}).") from error


def _count(av, path: str | os.PathLike) -> tuple[int, float]:
    """Frames and frames a second; counted packet by packet, for a header may not say."""
    with av.open(os.fspath(path)) as container:
        if not container.streams.video:
            raise BadImage(f"{path}: holds no video.")
        stream = container.streams.video[0]
        total = sum(packet.size > 0 for packet in container.demux(stream))
        if total == 0 or stream.frames > total:
            raise BadImage(f"{path}: is cut short ({total} of {stream.frames} frames).")
        return total, float(stream.average_rate or stream.guessed_rate or _UNKNOWN_RATE)


def _take(container, places: np.ndarray) -> list[np.ndarray]:
    """The frames at the given places, decoded in order up to the last one."""
    wanted, frames = set(places.tolist()), []
    container.streams.video[0].thread_type = "AUTO"
    for place, frame in enumerate(container.decode(video=0)):
        if place in wanted:
            frames.append(_upright(frame))
        if place == places[-1]:
            break
    return frames


def stills(path: str | os.PathLike, count: int) -> list[np.ndarray]:
    """Some frames to look at, [H, W, 3] uint8, RGB: the key frames nearest to even times.

    Unlike `open_video` it decodes no other frame; raises the same errors.
    """
    with _reading(path) as av, av.open(os.fspath(path)) as container:
        if not container.streams.video:
            raise BadImage(f"{path}: holds no video.")
        stream, frames = container.streams.video[0], {}
        for i in range(count):
            if i and container.duration:
                container.seek(container.duration * i // count)
            frame = next(container.decode(stream), None)
            if frame is not None:
                frames.setdefault(frame.pts, _upright(frame))
        return list(frames.values())


def _upright(frame) -> np.ndarray:
    picture = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90)))

"""Reading videos: evenly sampled frames, upright 8-bit RGB, with their rate."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from spatial_ssrl_jax.common.errors import BadImage, UserError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
from spatial_ssrl_jax.common.text import error_line

FPS, MAX_FRAMES = 2.0, 768  # the processor's defaults: frames a second, and the most frames
_MIN_FRAMES, _FRAMES_PER_PATCH = 4, 2
_UNKNOWN_RATE = 24.0


@dataclass(frozen=True)
class Video:
    """Sampled frames of a video.

    Attributes:
      frames: [F, H, W, 3] uint8, RGB.
      fps: frames a second among these frames, not in the file.
    """

    frames: np.ndarray
    fps: float


def sample_frame_indices(total: int, native: float, fps: float, max_frames: int) -> np.ndarray:
    """Indices of the frames to sample, as the Hub's processor does: evenly, an even number.

    Args:
      total: frames in the file.
      native: its frames a second.
      fps: frames a second wanted; at least four frames are sampled from a video that has them.
      max_frames: most frames to sample.

    Returns:
      [F] int64 indices, rising.
    """
    count = int(min(max(total / native * fps, _MIN_FRAMES), max_frames, total))
    count = max(count // _FRAMES_PER_PATCH * _FRAMES_PER_PATCH, 1)
    return (np.arange(count) * (total / count)).astype(np.int64)


def open_video(
    path: str | os.PathLike[str], fps: float = FPS, max_frames: int = MAX_FRAMES
) -> Video:
    """Reads a video file with PyAV (the `video` extra).

    Args:
      path: the file; its first video stream is read, turned upright by its display matrix.
      fps, max_frames: see `sample_frame_indices`.

    Raises:
      BadImage: the file is missing, holds no video, or is truncated.
      UserError: PyAV is not installed.
    """
    with _reading(path) as av:
        total, native = _count(av, path)
        indices = sample_frame_indices(total, native, fps, max_frames)
        with _open(av, path) as container:
            frames = _decode(container, indices)
    if len(frames) < len(indices):
        raise BadImage(f"{path}: only {len(frames)} of {len(indices)} frames can be decoded.")
    return Video(np.stack(frames), len(indices) / total * native)


def measure_video(
    path: str | os.PathLike[str], fps: float = FPS, max_frames: int = MAX_FRAMES
) -> tuple[int, int, int]:
    """Frames, height and width of the video that `open_video` returns; decodes one frame only.

    Raises:
      as `open_video`, except that damage after the first frame is not detected.
    """
    with _reading(path) as av:
        indices = sample_frame_indices(*_count(av, path), fps, max_frames)
        with _open(av, path) as container:
            frames = _decode(container, np.zeros(1, np.int64))
    if not frames:
        raise BadImage(f"{path}: no frame can be decoded.")
    height, width = frames[0].shape[:2]
    return len(indices), height, width


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[ModuleType]:
    """PyAV; its errors become a `BadImage` that names the file."""
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise UserError(
            f"{path}: reading videos needs PyAV: pip install 'spatial_ssrl_jax[video]'."
        ) from None
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadImage(f"{path}: is no file; give one with a video.")  # a pipe would hang
    try:
        yield av
    except FileNotFoundError:
        raise BadImage(f"{path}: there is no such file.") from None
    except (FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error_line(error)
        raise BadImage(f"{path}: cannot be read as a video ({reason}).") from error


def _open(av: ModuleType, path: str | os.PathLike[str]) -> "InputContainer":
    """An open file, whatever its titles and other metadata hold."""
    try:
        container = av.open(os.fspath(path), metadata_errors="replace")
    except TypeError:  # later versions have no such option
        container = av.open(os.fspath(path))
    if {"hls", "dash", "concat", "image2", "sdp"} & set(container.format.name.split(",")):
        container.close()
        raise BadImage(f"{path}: is a list of other files, which is not read; give a video.")
    return container


def _count(av: ModuleType, path: str | os.PathLike[str]) -> tuple[int, float]:
    """Frames, counted packet by packet as a header may lack their number, and frames a second."""
    with _open(av, path) as container:
        if not container.streams.video:
            raise BadImage(f"{path}: holds no video.")
        stream = container.streams.video[0]
        total = sum(packet.size > 0 for packet in container.demux(stream))
        if total == 0 or stream.frames > total:
            raise BadImage(f"{path}: is truncated ({total} of {stream.frames} frames).")
        return total, float(stream.average_rate or stream.guessed_rate or _UNKNOWN_RATE)


def _decode(container: "InputContainer", indices: np.ndarray) -> list[np.ndarray]:
    """The frames at `indices`, decoded in order up to the last one."""
    wanted, frames = set(indices.tolist()), []
    container.streams.video[0].thread_type = "AUTO"
    for index, frame in enumerate(container.decode(video=0)):
        if index in wanted:
            frames.append(_upright(frame))
        if index == indices[-1]:
            break
    return frames


def stills(path: str | os.PathLike[str], count: int) -> list[np.ndarray]:
    """Some frames to show, [H, W, 3] uint8, RGB: the key frames nearest to even times.

    Unlike `open_video` it decodes no other frame; raises the same errors.
    """
    with _reading(path) as av, _open(av, path) as container:
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


def _upright(frame: "VideoFrame") -> np.ndarray:
    image = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))

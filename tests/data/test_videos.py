"""Videos come out as evenly taken, upright RGB frames with their rate; broken ones are named."""

import os
import sys

import numpy as np
import pytest

from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.data.videos import open_video, sample_frame_indices

HEIGHT, WIDTH = 84, 112


@pytest.fixture(scope="module")
def av():
    return pytest.importorskip("av", reason="writes and reads videos, which needs PyAV")


@pytest.fixture(scope="module")
def film(av, tmp_path_factory):
    """A grey video whose frame i has brightness 20·i and a red top left corner."""
    folder = tmp_path_factory.mktemp("films")

    def make(name: str, frames: int = 12, rate: int = 4, turned: int = 0):
        path = folder / name
        with av.open(path, "w") as container:
            stream = container.add_stream("mpeg4", rate=rate)
            stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
            if turned:
                stream.set_display_rotation(turned)
            for i in range(frames):
                image = np.full((HEIGHT, WIDTH, 3), 20 * i % 256, np.uint8)
                image[:24, :24] = (255, 0, 0)
                for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
        return path

    return make


def grey(video):
    """Each frame's number, from the brightness of its middle."""
    middle = video.frames[:, video.frames.shape[1] // 2, video.frames.shape[2] // 2, 0]
    return np.rint(middle / 20).astype(int).tolist()


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_frames_are_taken_evenly(film, name):
    """Three seconds at 4 frames a second: every second frame is 2 frames a second."""
    video = open_video(film(name))
    assert video.frames.shape == (6, HEIGHT, WIDTH, 3) and video.frames.dtype == np.uint8
    assert grey(video) == [0, 2, 4, 6, 8, 10]
    assert video.fps == pytest.approx(2)
    every = open_video(film(name), fps=4)
    assert grey(every) == list(range(12)) and every.fps == pytest.approx(4)
    few = open_video(film(name), max_frames=4)
    assert grey(few) == [0, 3, 6, 9] and few.fps == pytest.approx(4 / 3)


@pytest.mark.parametrize("turned, corner", [(90, (-5, 5)), (-90, (5, -5)), (180, (-5, -5))])
def test_frames_are_turned_upright(film, turned, corner):
    """A display matrix that turns against the clock takes the top left corner with it."""
    video = open_video(film(f"{turned}.mp4", turned=turned))
    size = (HEIGHT, WIDTH) if turned == 180 else (WIDTH, HEIGHT)
    assert video.frames.shape == (6, *size, 3)
    red, green, _ = video.frames[2][corner].astype(int)
    assert red - green > 150


@pytest.mark.parametrize(
    "total, native, fps, max_frames, expected",
    [
        (12, 4, 2, 768, [0, 2, 4, 6, 8, 10]),
        (10, 30, 2, 768, [0, 2, 5, 7]),  # a third of a second: at least four frames
        (7, 2, 2, 768, [0, 1, 2, 3, 4, 5]),  # an even number
        (3, 1, 2, 768, [0, 1]),
        (1, 25, 2, 768, [0]),
        (9000, 30, 2, 4, [0, 2250, 4500, 6750]),
    ],
)
def test_sampled_frames(total, native, fps, max_frames, expected):
    assert sample_frame_indices(total, native, fps, max_frames).tolist() == expected


def test_a_truncated_video_is_named(film):
    path = film("cut.avi", frames=40)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadImage, match=r"cut\.avi: is truncated \(\d+ of 40 frames\)"):
        open_video(path)


def test_a_title_that_is_no_unicode_is_no_damage(av, tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(path, "w") as container:
        container.metadata["title"] = "title" * 9
        stream = container.add_stream("mpeg4", rate=4)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        image = av.VideoFrame.from_ndarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8), format="rgb24")
        for frame in (image, None):
            container.mux(stream.encode(frame))
    content = path.read_bytes()
    assert b"title" * 9 in content
    path.write_bytes(content.replace(b"title" * 9, b"\xff" * 45))
    assert open_video(path).frames.shape == (1, HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("content", [b"", b"no video", b"\x00\x00\x00\x18ftypmp42" + b"x" * 90])
def test_what_is_no_video_is_named(av, tmp_path, content):
    path = tmp_path / "x.mp4"
    path.write_bytes(content)
    with pytest.raises(BadImage, match=r"x\.mp4: cannot be read as a video \(.*\)\.$"):
        open_video(path)


def test_other_files_are_named(av, tmp_path):
    with pytest.raises(BadImage, match=r"gone\.mp4: there is no such file"):
        open_video(tmp_path / "gone.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(BadImage, match=r"pipe\.mp4: is no file; give one with a video"):
        open_video(tmp_path / "pipe.mp4")
    with av.open(tmp_path / "sound.wav", "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        for packet in [*stream.encode(sound), *stream.encode()]:
            container.mux(packet)
    with pytest.raises(BadImage, match=r"sound\.wav: holds no video"):
        open_video(tmp_path / "sound.wav")


def test_a_list_of_other_files_is_refused(av, tmp_path):
    """A playlist would lead out of the folder that its path is in."""
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:10", "#EXTINF:2,", "part.ts", "#EXT-X-ENDLIST"]
    (tmp_path / "a.m3u8").write_text("\n".join(lines) + "\n")
    with av.open(str(tmp_path / "part.ts"), "w") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(50):
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(BadImage, match=r"a\.m3u8: is a list of other files"):
        open_video(tmp_path / "a.m3u8")


def test_without_pyav_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"v\.mp4: reading videos needs PyAV.*\[video\]"):
        open_video("v.mp4")

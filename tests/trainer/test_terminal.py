"""What a person at a terminal sees and can do, in a process with a terminal of its own."""

import dataclasses
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax.trainer.preemption import STOPPING
from tests.helpers.toy_runs import ROWS, make_config
from tests.trainer.test_training import ROOT, figures, write_config


class Terminal:
    """A command that runs at a terminal of 100 characters a line."""

    def __init__(self, *argv: str):
        self._own, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        command = [sys.executable, "-m", "spatial_ssrl_jax.train", *argv]
        environment = os.environ | {"TERM": "xterm-256color", "JAX_PLATFORMS": "cpu"}
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
        self.process = subprocess.Popen(command, env=environment, cwd=ROOT, **streams)
        os.close(theirs)
        self.text = ""

    def _chunks(self) -> Iterator[str]:
        while True:
            try:
                chunk = os.read(self._own, 1 << 16)
            except OSError:  # the process has ended
                return
            yield re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", chunk.decode(errors="replace"))

    def until(self, pattern: str) -> None:
        """Reads on until the text holds the pattern."""
        for chunk in self._chunks():
            self.text += chunk
            if re.search(pattern, self.text):
                return
        raise AssertionError(f"{pattern} never came:\n{self.text}")

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self) -> int:
        """Reads all that still comes; gives the exit code."""
        self.text += "".join(self._chunks())
        os.close(self._own)
        return self.process.wait(timeout=60)


@pytest.fixture
def argv(toy_folder: Path, tmp_path: Path) -> list[str]:
    """SFT that would take minutes, without held-out images."""
    model = c.ModelSettings(str(toy_folder), True, "float32", "none")
    data = dataclasses.replace(make_config(model).data, heldout_fraction=0.0)
    sft = c.SftSettings(steps=900, **ROWS | {"prompts": 48})
    config = make_config(model, sft=sft, data=data, checkpoint=c.CheckpointSettings(every=1000))
    return [f"--config={write_config(tmp_path, config)}", f"--workdir={tmp_path / 'run'}"]


def test_ctrl_c_once_saves_and_twice_exits_at_once(argv: list[str], tmp_path: Path):
    terminal = Terminal(*argv)
    terminal.until(r"\d/900 loss \d")
    terminal.interrupt()
    assert terminal.end() == 0, terminal.text
    assert "opening the model" in terminal.text
    assert re.search(r"0/900 compiling the programs of sft \(first step\) +\d:\d\d", terminal.text)
    assert terminal.text.count(STOPPING) == 1
    last = figures(tmp_path / "run")[-1]["step"]
    assert f"stopped after step {last}; the same command resumes from here" in terminal.text
    assert (tmp_path / "run" / "checkpoints" / str(last)).is_dir()

    terminal = Terminal(*argv)
    terminal.until(r"\d/900 loss \d")
    terminal.interrupt()
    terminal.until(STOPPING)
    terminal.interrupt()
    assert terminal.end() == 130, terminal.text
    assert f"resuming after step {last}" in terminal.text
    assert terminal.text.rstrip().endswith("stopped") and "Traceback" not in terminal.text

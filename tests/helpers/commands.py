"""Commands of the package in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def run_command(folder: Path, command: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m spatial_ssrl_jax.COMMAND ARGV` in a folder, and keeps what it prints."""
    words = [sys.executable, "-m", f"spatial_ssrl_jax.{command}", *argv]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)

"""What a run records of the user's own code, by which a resumed one says what has changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spatial_ssrl_jax.config.load import load_config, to_dict
from spatial_ssrl_jax.config.user_code import load_module, source_of
from tests.conftest import ROOT

FILE = """
import functools
from dataclasses import dataclass, field

WORDS = {"alpha", "beta", "gamma", "delta"}
LONG = "x" * 20_000
def near(text): return 1.0
TABLE = {"near": near}

def table(r, a, e, n): return TABLE["near"](r)
def words(r, a, e, n): return r in WORDS
def long(r, a, e, n): return r in LONG
def scaled(scale):
    def inner(r, a, e, n): return scale * near(r)
    return inner
closure = scaled(0.5)
part = functools.partial(table, n=0.25)
cached = functools.cache(words)

class Base:
    def helper(self): return 1.5

@dataclass
class Reward(Base):
    scale: float
    marks: list = field(default_factory=list)
    @staticmethod
    def other(): return near("")
    def __call__(self, r, a, e, n): return self.scale
instance = Reward(0.75)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("table", "return 1.0", "return 2.0"),
        ("words", '"beta", ', ""),
        ("long", "* 20_000", "* 20_001"),
        ("closure", "scaled(0.5)", "scaled(0.6)"),
        ("closure", "return 1.0", "return 2.0"),
        ("part", "n=0.25", "n=0.5"),
        ("part", 'TABLE["near"](r)', "0.0"),
        ("cached", "r in WORDS", "r not in WORDS"),
        ("instance", "Reward(0.75)", "Reward(0.8)"),
        ("instance", "return self.scale", "return 1 - self.scale"),
        ("instance", "return 1.5", "return 2.5"),
        ("instance", "return 1.0", "return 2.0"),
    ],
)
def test_what_a_reward_uses_is_recorded(file: Path, name: str, before: str, after: str):
    recorded = []
    for text in (FILE, FILE, FILE.replace(before, after)):
        file.write_text(text)
        recorded.append(source_of(getattr(load_module(str(file)), name)))
    assert recorded[0] == recorded[1] != recorded[2]
    assert all(len(text) < 2_000 for text in recorded[0].values())


def test_it_is_the_same_in_every_process(file: Path):
    """Neither the order of a set nor an address is recorded: a run could not be resumed."""
    program = (
        "import sys; from spatial_ssrl_jax.config import user_code as u; "
        "m = u.load_module(sys.argv[1]); "
        "print([u.source_of(f) for f in (m.table, m.words, m.closure, m.part, m.instance)])"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program, str(file)],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


def test_a_config_that_loads_another_has_its_own_classes(tmp_path: Path):
    """Also those whose settings have defaults that are made."""
    tiny = ROOT / "configs" / "tiny.py"
    path = tmp_path / "own.py"
    text = f"""
from dataclasses import dataclass, field, replace

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax.tasks.example import Task

@dataclass(frozen=True)
class MySettings:
    weight: float = 0.0
    kinds: dict[str, float] = field(default_factory=lambda: {{"a": 1.0}})

def make(record, rng, settings): ...

def get_config():
    task = Task("own", False, MySettings, make)
    return replace(c.load_config({str(tiny)!r}), extra_tasks=(task,))
"""
    path.write_text(text)
    (task,) = to_dict(load_config(str(path)))["extra_tasks"]
    assert '{"a": 1.0}' in task["settings"]["source"]["MySettings"]

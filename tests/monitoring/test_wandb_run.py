"""W&B, by a stand-in for its package that notes what it is told."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.monitoring.metrics import MetricsWriter
from spatial_ssrl_jax.monitoring.wandb_run import WandbRun, check_wandb


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What the stand-in was asked for, in order."""
    noted: list[tuple] = []

    def init(**options) -> SimpleNamespace:
        noted.append(("init", options))
        return SimpleNamespace(
            id=options["id"] or "abc1",
            log=lambda values, step: noted.append(("log", step, values)),
            finish=lambda: noted.append(("finish",)),
        )

    stand_in = ModuleType("wandb")
    stand_in.init = init
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return noted


def test_figures_go_there_under_their_names(calls: list, tmp_path: Path):
    tracker = WandbRun("space", "tiny", tmp_path, {"seed": 3})
    writer = MetricsWriter(tmp_path, tracker=tracker)
    writer.write("grpo", 4, {"loss/kl": 0.5, "loss/total": float("nan")})
    writer.close()
    (_, options), log, end = calls
    assert options["project"] == "space" and options["name"] == "tiny"
    assert options["config"] == {"seed": 3} and options["id"] is options["resume"] is None
    assert (log, end) == (("log", 4, {"loss/kl": 0.5}), ("finish",))


def test_a_restart_goes_on_in_the_same_run(calls: list, tmp_path: Path):
    for _ in range(2):
        WandbRun("space", "tiny", tmp_path, {})
    assert calls[1][1]["id"] == "abc1" and calls[1][1]["resume"] == "allow"


def test_a_missing_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch):
    check_wandb("")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"log\.wandb=space needs W&B: pip install .*wandb"):
        check_wandb("space")


def test_a_refusal_is_a_sentence(calls: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def refuse(**_):
        raise RuntimeError("no key")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(UserError, match=r"W&B cannot begin \(no key\): log in"):
        WandbRun("space", "tiny", tmp_path, {})
    assert list(tmp_path.iterdir()) == []

"""W&B, with a fake package that records its calls."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.monitoring.metrics import MetricsWriter
from spatial_ssrl_jax.monitoring.wandb_run import WandbRun, check_wandb


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The calls of the fake package, in order."""
    recorded: list[tuple] = []

    def init(**options) -> SimpleNamespace:
        recorded.append(("init", options))
        return SimpleNamespace(
            id=options["id"] or "abc1",
            log=lambda values, step: recorded.append(("log", step, values)),
            finish=lambda: recorded.append(("finish",)),
        )

    fake = ModuleType("wandb")
    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return recorded


def test_metrics_go_there_under_their_names(calls: list, tmp_path: Path):
    tracker = WandbRun("space", "tiny", tmp_path, {"seed": 3})
    writer = MetricsWriter(tmp_path, tracker=tracker)
    writer.write("grpo", 4, {"loss/kl": 0.5, "loss/total": float("nan")})
    writer.close()
    (_, options), log, end = calls
    assert options["project"] == "space" and options["name"] == "tiny"
    assert options["config"] == {"seed": 3} and options["id"] is options["resume"] is None
    assert (log, end) == (("log", 4, {"loss/kl": 0.5}), ("finish",))


def test_a_restart_continues_the_same_run(calls: list, tmp_path: Path):
    for _ in range(2):
        WandbRun("space", "tiny", tmp_path, {})
    assert calls[1][1]["id"] == "abc1" and calls[1][1]["resume"] == "allow"


def test_a_missing_package_is_an_error(monkeypatch: pytest.MonkeyPatch):
    check_wandb("")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"log\.wandb=space needs W&B: pip install .*wandb"):
        check_wandb("space")


def test_a_refusal_is_an_error(calls: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def refuse(**_):
        raise RuntimeError("no key")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(UserError, match=r"W&B cannot start \(no key\): log in"):
        WandbRun("space", "tiny", tmp_path, {})
    assert list(tmp_path.iterdir()) == []

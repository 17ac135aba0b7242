"""Runs with other policy losses and corrections than the paper's."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax.monitoring.metrics import read_metrics
from spatial_ssrl_jax.trainer import training
from spatial_ssrl_jax.trainer.training import train
from tests.trainer.test_training import StopAfter, figures, weights


def test_a_kl_that_decays_resumes_exactly_and_compiles_nothing_late(
    toy_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With sequence-level ratios and corrections."""
    settings = replace(
        toy_config().grpo,
        policy_loss="gspo",
        clip_low=3e-4,
        clip_high=4e-4,
        advantage="rloo",
        scale_rewards=False,
        kl_coef=0.5,
        kl_schedule="linear",
        importance_correction="mask",
        importance_level="sequence",
    )
    config = toy_config(sft=c.SftSettings(), grpo=settings)
    # One size of caches: what is left of a rollout needs no other program.
    config = replace(config, rollout=replace(config.rollout, kv_block=32))
    assert train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(training, "Preemption", StopAfter)
        StopAfter.looks = 4
        assert not train(config, tmp_path / "run")
    assert figures(tmp_path / "run")[-1]["step"] == 2
    assert train(config, tmp_path / "run")
    rows = figures(tmp_path / "whole")
    assert figures(tmp_path / "run") == rows
    assert all(map(np.array_equal, weights(tmp_path / "run"), weights(tmp_path / "whole")))
    for row, coef in zip(rows[1:], [0.5, 1 / 3, 1 / 6], strict=True):
        assert row["kl/coef"] == pytest.approx(coef)
        assert row["loss/kl"] == pytest.approx(coef * row["kl/mean"], rel=1e-4) and row["loss/kl"]
        assert row["mismatch/correction_mean"] > 0 and row["optim/gradient_norm"] > 0
    counts = {r["step"]: r.get("perf/compilations") for r in read_metrics(tmp_path / "whole")}
    assert counts[3] == counts[2] > 0

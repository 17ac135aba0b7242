"""Rewards of one's own: what they may give, and what becomes of those that fail or hang."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.load import to_dict, with_overrides
from spatial_ssrl_jax.config.schema import Config, RewardSettings
from spatial_ssrl_jax.rl.rewards import Reward
from spatial_ssrl_jax.rl.scorer import SampledGroup, Scorer
from spatial_ssrl_jax.rl.step_metrics import ScoredRollout, rollout_metrics, rollout_rows
from spatial_ssrl_jax.rollout.engine import Rollout
from spatial_ssrl_jax.tasks.example import Example
from tests.conftest import ROOT

EXAMPLE = Example(
    "flip", "x", (np.zeros((9, 9, 3), np.uint8),), "?", "4", "", {"n": 4}, {"record": "a.png"}
)
GOOD = "<think>a</think>\\boxed{4}"


def own(response: str, answer: str, example: Example, tokens: int) -> float | dict[str, float]:
    """A reward that does all that a user's may do."""
    if response == "parts":
        return {"near": 0.25, "far": 0.5}
    if response == "overall":
        return {"overall": 2, "near": 0.25, "accuracy": 0.75, "format": np.float32(0.5)}
    if response == "hang":
        time.sleep(60)
    if response == "die":
        os._exit(1)
    if response == "raise":
        raise KeyError("no such thing")
    if response == "platform":
        return jax.config.jax_platforms == "cpu"
    if response == "pictures":
        return len(example.images)
    bad = {"nan": float("nan"), "text": "1", "none": None, "empty": {}, "name": {"a b": 1.0}}
    if response in bad:
        return bad[response]
    return tokens + example.truth["n"] + float(answer) / 100


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    settings = RewardSettings(function=own, workers=1, timeout=2.0, max_failed_fraction=1.0)
    found = Scorer(settings, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_PLATFORMS", raising=False)
        score(found, GOOD)  # starts the worker
    yield found
    found.close()


def score(scorer: Scorer, *texts: str):
    return scorer.score([SampledGroup(EXAMPLE, texts, [7] * len(texts))])[0]


def test_what_a_function_gives(scorer: Scorer):
    platform, number, parts, overall, pictures = score(
        scorer, "platform", GOOD, "parts", "overall", "pictures"
    )
    assert platform.overall == 1  # the accelerators are the run's
    assert (number.overall, number.accuracy, number.format) == (pytest.approx(11.04), 1, 1)
    assert (parts.overall, parts.parts) == (0.75, {"near": 0.25, "far": 0.5})
    assert (parts.accuracy, parts.format) == (0, 0)  # by the rule
    assert (overall.overall, overall.parts) == (2, {"near": 0.25})
    assert (overall.accuracy, overall.format) == (0.75, 0.5)
    assert pictures.overall == 0  # they are not sent


@pytest.mark.parametrize(
    ("response", "said"),
    [
        ("raise", "KeyError: 'no such thing' (a response to a.png)"),
        ("nan", "it gives nan for overall; expected a finite number"),
        ("text", "it gives '1' for overall; expected a number"),
        ("none", "it gives None for overall; expected a number"),
        ("empty", "it gives 0 numbers; expected 1 to 32"),
        ("name", "it names a part 'a b'"),
        ("hang", "it takes more than 2 s (a response to a.png)"),
        ("die", "its process ends (a response to a.png)"),
    ],
)
def test_a_failure_earns_nothing_and_the_next_response_is_scored(scorer, response, said):
    failed, after = score(scorer, response, GOOD)
    assert said in failed.failure and failed.overall == 0
    assert after.failure == "" and after.overall == pytest.approx(11.04)


def test_too_many_failures_stop_the_run():
    scorer = Scorer(RewardSettings(function=own, workers=2, max_failed_fraction=0.25), {})
    try:
        group = SampledGroup(EXAMPLE, ["raise", GOOD, GOOD, GOOD], [7] * 4)
        assert [bool(r.failure) for r in scorer.score([group])[0]] == [True, False, False, False]
        worse = SampledGroup(EXAMPLE, ["raise", "raise", GOOD, GOOD], [7] * 4)
        with pytest.raises(
            UserError, match=r"3 of 8 responses have no reward; the first: KeyError"
        ):
            scorer.score([group, worse])
    finally:
        scorer.close()


def test_closing_does_not_wait_for_responses():
    scorer = Scorer(RewardSettings(function=own, workers=1, timeout=600.0), {})
    groups = [SampledGroup(EXAMPLE, ["hang"] * 3, [7] * 3)] * 3

    def run():
        with suppress(CancelledError):
            scorer.score(groups)

    threading.Thread(target=run, daemon=True).start()
    time.sleep(1)
    start = time.monotonic()
    scorer.close()
    assert time.monotonic() - start < 30 and not scorer._workers


KILLED = """
import multiprocessing, os, signal, sys, threading, time
from spatial_ssrl_jax.config.schema import RewardSettings
from spatial_ssrl_jax.rl.scorer import SampledGroup, Scorer
from spatial_ssrl_jax.tasks.example import Example

def hang(r, a, e, n):
    open(r, "w").write(str(os.getpid()))
    while True:
        pass

if __name__ == "__main__":
    path = sys.argv.pop()
    group = SampledGroup(Example("flip", "x", (), "?", "4", "", {}, {}), [path], [1])
    scorer = Scorer(RewardSettings(function=hang, workers=1, timeout=600.0), {})
    threading.Thread(target=scorer.score, args=([group],), daemon=True).start()
    while not (os.path.exists(path) and os.path.getsize(path)):
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_that_hangs_ends_with_a_run_that_is_killed(tmp_path: Path):
    (tmp_path / "run.py").write_text(KILLED)
    words = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "pid")]
    run = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300)
    assert run.returncode == -signal.SIGKILL
    pid, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


def test_a_function_that_cannot_be_sent_is_named():
    lock = threading.Lock()
    scorer = Scorer(RewardSettings(function=lambda *_: float(lock.locked()), workers=1), {})
    with pytest.raises(UserError, match=r"cannot be sent to other processes \(TypeError"):
        score(scorer, GOOD)
    scorer.close()


def test_parts_and_failures_are_metrics(scorer: Scorer):
    rewards = scorer.score([SampledGroup(EXAMPLE, [GOOD, "parts", "raise", "overall"], [7] * 4)])
    ones = np.ones((1, 4), np.int32)
    rollout = Rollout(ones[..., None], ones[..., None] * 0.0, ones, ones > 0)
    scored = ScoredRollout(rollout, [], rewards, ones * 0.0)
    items = [SimpleNamespace(example=EXAMPLE)]
    metrics = rollout_metrics(rollout_rows(items, scored))
    assert metrics["reward/part/near"] == 0.25 and metrics["reward/part/far"] == 0.5
    assert metrics["reward/failed_share"] == 0.25
    assert metrics["reward/accuracy_mean"] == pytest.approx((1 + 0 + 0 + 0.75) / 4)
    named = [[Reward(0, 0, 0, {f"part_{i}": 1.0}) for i in range(33)]]
    with pytest.raises(UserError, match=r"names 33 parts in one step \(part_0, part_1, part_10"):
        rollout_rows(items, replace(scored, rewards=named))


def test_a_function_is_named_by_its_file_and_recorded_with_what_it_uses(tmp_path: Path):
    file = tmp_path / "mine.py"
    text = "SCALE = {}\nhalf = lambda x: SCALE * x\ndef reward(r, a, e, n):\n    return half(n)\n"
    recorded = []
    for scale in (0.5, 0.25):
        file.write_text(text.format(scale))
        set_to = [("reward.function", f"{file}:reward"), ("reward.workers", "1")]
        config = with_overrides(Config("x"), set_to)
        recorded.append(to_dict(config)["reward"]["function"])
        scorer = Scorer(config.reward, {})
        assert scorer.score([SampledGroup(EXAMPLE, ["x"], [8])])[0][0].overall == 8 * scale
        scorer.close()
    assert recorded[0]["name"] == "reward"
    assert recorded[0]["source"]["SCALE"] == "0.5" and "SCALE * x" in recorded[0]["source"]["half"]
    assert recorded[0] != recorded[1]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("mine", "write FILE.py:NAME"),
        ("gone.py:reward", "there is no file gone.py"),
        ("{file}:other", "has no function other, only reward"),
        ("{broken}:reward", "cannot be run (NameError"),
    ],
)
def test_a_function_that_is_not_there_is_named(tmp_path: Path, value: str, said: str):
    (tmp_path / "mine.py").write_text("def reward(r, a, e, n):\n    return 1\n")
    (tmp_path / "broken.py").write_text("x\n")
    value = value.format(file=tmp_path / "mine.py", broken=tmp_path / "broken.py")
    with pytest.raises(UserError) as found:
        with_overrides(Config("x"), [("reward.function", value)])
    assert said in str(found.value)

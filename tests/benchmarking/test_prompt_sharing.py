"""What sharing a prompt saves: the real prompts' sizes, the curve by hand, and the command."""

import json
from pathlib import Path

import pytest

from spatial_ssrl_jax import bench
from spatial_ssrl_jax.benchmarking.prompt_sharing import LENGTHS, MIX, TaskPrompt, sharing_curve
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.perf.flops import GroupShape, step_flops
from spatial_ssrl_jax.qwen_vl.family import read_config
from spatial_ssrl_jax.tasks import TASKS

COCO, DIODE = 34 * 46, 54 * 74  # patches
SQUARE = 38 * 38  # an option of 240 pixels, grown to the min area


@pytest.fixture
def report(shared: Path, capsys: pytest.CaptureFixture) -> dict:
    folder = shared / "qwen2_5_vl"
    bench.main(["flops", f"--model={folder / '3b'}", f"--processor={folder}", "--json"])
    return json.loads(capsys.readouterr().out)


def test_sharing_saves_at_the_real_sizes(report: dict):
    """At 200 tokens a response, at least 2.5 times over the five tasks' mix."""
    points = report["flops"][MIX]
    assert list(points) == [str(length) for length in LENGTHS]
    assert points["200"]["ratio"] > 2.5
    ratios = [point["ratio"] for point in points.values()]
    assert ratios == sorted(ratios, reverse=True) and ratios[-1] > 1 and ratios[0] < 5


def test_the_prompts_are_the_papers(report: dict):
    patches = {name: prompt["patches"] for name, prompt in report["prompts"].items()}
    assert patches == {
        "shuffle": COCO,
        "flip": COCO,
        "crop": COCO + 4 * SQUARE,
        "depth": DIODE,
        "position": DIODE,
    }
    for name, prompt in report["prompts"].items():
        words = prompt["tokens"] - prompt["patches"] // 4
        assert 100 < words < 250, name
    weights = {task.name: task.settings().weight for task in TASKS}
    for name, prompt in report["prompts"].items():
        assert prompt["weight"] == pytest.approx(weights[name] / 81_053)


def test_the_mix_is_the_mean_by_weight(shared: Path):
    config = read_config(shared / "qwen2_5_vl" / "7b")
    prompts = {
        "a": TaskPrompt(3.0, 400, ((1, 34, 46),)),
        "b": TaskPrompt(1.0, 1000, ((1, 54, 54),)),
    }
    curve = sharing_curve(config, prompts, group=4, lengths=(60,))
    shapes = [GroupShape(p.tokens, p.grids, 4, 60) for p in prompts.values()]
    for how, shared_step in (("shared", True), ("per_sample", False)):
        a, b = (step_flops(config, shape, 2, shared_step) for shape in shapes)
        assert curve[MIX][60][how] == pytest.approx((3 * a + b) / 4)
    assert curve["a"][60]["per_sample"] == pytest.approx(
        4 * step_flops(config, shapes[0].alone(), 2, True)
    )


def test_the_table_has_a_column_a_length(shared: Path, capsys: pytest.CaptureFixture):
    folder = shared / "qwen2_5_vl"
    bench.main(["flops", f"--model={folder / '3b'}", f"--processor={folder}", "--group=3"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[-len(LENGTHS) :] == [str(length) for length in LENGTHS]
    assert [row.split()[0] for row in rows[::3]] == [*(task.name for task in TASKS), MIX]


def test_a_group_or_model_that_does_not_fit_is_refused(shared: Path):
    folder = shared / "qwen2_5_vl"
    with pytest.raises(UserError, match="--group=0 must be at least 1"):
        bench.main(["flops", "--model=tiny", "--group=0"])
    with pytest.raises(UserError, match="tokenizer_config.json is missing"):
        bench.main(["flops", f"--model={folder / '3b'}"])

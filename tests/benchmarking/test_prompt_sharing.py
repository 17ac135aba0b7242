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
SQUARE = 36 * 36  # an option of 240 pixels, grown to the min area
SOURCE = "shuffle,flip,crop@scenes:9:640x480+depth,position@nyu:x+depth@3*diode:x"


@pytest.fixture
def options(shared: Path, tmp_path: Path) -> list[str]:
    """Of `bench flops`, with the paper's text and images of three sizes."""
    (tmp_path / "c.py").write_text(
        "from spatial_ssrl_jax import config as c\n"
        f"def get_config(): return c.Config('x', data=c.DataSettings(source={SOURCE!r}))\n"
    )
    folder = shared / "qwen2_5_vl"
    return [
        "flops",
        f"--config={tmp_path / 'c.py'}",
        f"--model={folder / '3b'}",
        f"--processor={folder}",
    ]


@pytest.fixture
def report(options: list[str], capsys: pytest.CaptureFixture) -> dict:
    bench.main([*options, "--json"])
    return json.loads(capsys.readouterr().out)


def test_sharing_saves_at_the_real_sizes(report: dict):
    """At 200 tokens a response, at least 2.5 times over the five tasks' mix."""
    points = report["flops"][MIX]
    assert list(points) == [str(length) for length in LENGTHS]
    assert points["200"]["ratio"] > 2.5
    ratios = [point["ratio"] for point in points.values()]
    assert ratios == sorted(ratios, reverse=True) and ratios[-1] > 1 and ratios[0] < 5


def test_the_prompts_are_those_of_the_configs_sources(report: dict):
    patches = {name: prompt["patches"] for name, prompt in report["prompts"].items()}
    assert patches == {
        "shuffle": COCO,
        "flip": COCO,
        "crop": COCO + 4 * SQUARE,
        "depth": round((COCO + 3 * DIODE) / 4),
        "position": COCO,
    }
    for name, prompt in report["prompts"].items():
        words = prompt["tokens"] - prompt["patches"] // 4
        assert 100 < words < 250, name
    weights = {task.name: task.settings().weight for task in TASKS}
    for name, prompt in report["prompts"].items():
        assert prompt["weight"] == pytest.approx(weights[name] / 81_053)


def test_the_mix_is_the_mean_by_weight(shared: Path):
    config = read_config(shared / "qwen2_5_vl" / "7b")
    first, second = TaskPrompt(3.0, 400, ((1, 34, 46),)), TaskPrompt(1.0, 1000, ((1, 54, 54),))
    curve = sharing_curve(config, {"a": [first], "b": [second]}, group=4, lengths=(60,))
    both = sharing_curve(config, {"c": [first, second]}, group=4, lengths=(60,))
    assert both["c"] == curve[MIX] == both[MIX]
    shapes = [GroupShape(p.tokens, p.grids, 4, 60) for p in (first, second)]
    for how, shared_step in (("shared", True), ("per_sample", False)):
        a, b = (step_flops(config, shape, 1.5, shared_step) for shape in shapes)
        assert curve[MIX][60][how] == pytest.approx((3 * a + b) / 4)
    assert curve["a"][60]["per_sample"] == pytest.approx(
        4 * step_flops(config, shapes[0].alone(), 1.5, True)
    )


def test_the_table_has_a_column_a_length(options: list[str], capsys: pytest.CaptureFixture):
    bench.main([*options, "--group=3"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[-len(LENGTHS) :] == [str(length) for length in LENGTHS]
    assert [row.split()[0] for row in rows[::3]] == [*(task.name for task in TASKS), MIX]


def test_a_group_model_or_source_that_does_not_fit_is_refused(shared: Path, options: list[str]):
    with pytest.raises(UserError, match="--group=0 must be at least 1"):
        bench.main([*options, "--group=0"])
    with pytest.raises(UserError, match="tokenizer_config.json is missing"):
        bench.main(options[:-1])
    with pytest.raises(UserError, match="rgbd:x cannot be opened here, and the sizes"):
        bench.main([*options, "--config.data.source=rgbd:x"])

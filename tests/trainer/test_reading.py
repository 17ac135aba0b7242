"""A run's sources and its benchmark are read as `data` says."""

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.tasks.flip import QUESTION
from spatial_ssrl_jax.trainer.benchmark_eval import open_eval_benchmark
from spatial_ssrl_jax.trainer.context import open_components
from tests.conftest import ROOT
from tests.helpers import benchmark_files as files


def test_paths_of_a_run_stay_inside_unless_allowed(tmp_path: Path):
    (tmp_path / "in").mkdir()
    Image.new("RGBA", (224, 224)).save(tmp_path / "a.png")
    row = {"instruction": QUESTION, "output": "\\boxed{2-0}", "images": ["../a.png"]}
    (tmp_path / "in/sft.json").write_text(json.dumps([row]))
    tiny = c.load_config(str(ROOT / "configs" / "tiny.py"))
    released = dataclasses.replace(tiny.sft, responses=str(tmp_path / "in/sft.json"))
    rows = [files.mcq_row(0, image_path="../a.png")]
    del rows[0]["image"]
    path = files.write_tsv(tmp_path / "in/BLINK.tsv", rows)
    asked = dataclasses.replace(tiny.eval, benchmark="blink", benchmark_data=str(path))
    config = dataclasses.replace(tiny, sft=released, eval=asked)
    with pytest.raises(UserError, match=r"sft\.json.*data\.allow_outside_paths"):
        open_components(config)
    with pytest.raises(UserError, match=r"BLINK\.tsv.*data\.allow_outside_paths"):
        open_eval_benchmark(config)
    data = dataclasses.replace(tiny.data, allow_outside_paths=True)
    assert len(open_eval_benchmark(dataclasses.replace(config, data=data)).questions) == 1
    open_components(dataclasses.replace(config, data=data))


@pytest.mark.parametrize(("transparency", "value"), [("white", 255), ("drop", 0)])
def test_transparent_pixels_of_a_run(tmp_path: Path, transparency: str, value: int):
    for number in range(4):
        Image.new("RGBA", (224, 224)).save(tmp_path / f"{number}.png")
    tiny = c.load_config(str(ROOT / "configs" / "tiny.py"))
    data = dataclasses.replace(
        tiny.data, source=f"folder:{tmp_path}", transparency=transparency, heldout_fraction=0.0
    )
    source = open_components(dataclasses.replace(tiny, data=data)).source
    assert (source[0].image == value).all()

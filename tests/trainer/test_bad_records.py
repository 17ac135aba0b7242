"""Questions that a run cannot use, and tasks without held-out ones: named and counted."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.split import _position
from spatial_ssrl_jax.tasks.flip import QUESTION as FLIP
from spatial_ssrl_jax.tasks.shuffle import question
from spatial_ssrl_jax.trainer.context import open_components
from spatial_ssrl_jax.trainer.preflight import preflight
from spatial_ssrl_jax.trainer.training import train
from tests.helpers.images import photo
from tests.helpers.toy_runs import ROWS, make_config

SHUFFLE = question(3, 1, masked=False)
SHARE = 0.2  # of the images is held out

Make = Callable[..., c.Config]


@pytest.fixture
def run_of(toy_folder: Path, tmp_path: Path) -> Make:
    """Makes the config of a short run on the questions in `tmp_path`; keywords are of `data`."""

    def make(**data) -> c.Config:
        source = f"ssrl81k:{tmp_path / 'train.parquet'}"
        model = c.ModelSettings(str(toy_folder), True, "float32", "none")
        defaults = vars(make_config(model).data) | {"source": source, "heldout_fraction": SHARE}
        return make_config(
            model,
            data=c.DataSettings(**(defaults | data)),
            sft=c.SftSettings(steps=1, learning_rate=1e-3, **ROWS),
            grpo=c.GrpoSettings(steps=0),
            eval=c.EvalSettings(examples=2, samples=2, batch_prompts=8),
        )

    return make


def write(folder: Path, questions: Sequence[tuple[str, str | None, bool]]) -> None:
    """A parquet file of (question, answer, whether it is held out), each with an image."""
    names = count()
    rows = []
    for text, answer, held_out in questions:
        name = next(n for i in names if (_position(n := f"images/{i}.png") < SHARE) == held_out)
        (folder / "images").mkdir(exist_ok=True)
        Image.fromarray(photo(1, 56, 56)).save(folder / name)
        rows.append({"problem": text, "answer": answer, "images": [name]})
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")


def test_a_trained_task_without_held_out_questions_is_said_and_trains(
    run_of: Make, tmp_path: Path, capsys: pytest.CaptureFixture
):
    questions = [(FLIP, "3-0", True)] * 2 + [(SHUFFLE, "0-2-1", False), (FLIP, "3-0", False)] * 4
    write(tmp_path, [*questions, (FLIP, None, False)])
    missing = (
        "no held-out metrics of shuffle, as no record is held out: raise data.heldout_fraction"
    )
    bad = f"question 10 of {tmp_path}/train.parquet: its answer is null, expected text"
    notes = preflight(run_of(), tmp_path / "run")["notes"]
    assert missing in notes and any(f"1 of 11 questions left out: {bad}" in note for note in notes)
    assert train(run_of(), tmp_path / "run")
    said = capsys.readouterr().out
    assert missing in said and bad in " ".join(said.split())
    heldout = json.loads((tmp_path / "run/summary.json").read_text())["heldout"]["sft"]
    assert set(heldout) == {"flip", "mean"} and heldout["flip"]["count"] == 2


@pytest.mark.parametrize(
    ("held_out", "broken", "message"),
    [
        (False, False, "no image is held out, so there are no held-out metrics: raise data.held"),
        (True, True, r"no held-out metrics of flip, as .* has no valid flip example .* raise data"),
    ],
)
def test_without_held_out_examples_there_is_a_note(
    run_of: Make, tmp_path: Path, held_out: bool, broken: bool, message: str
):
    write(
        tmp_path, [(FLIP, "3-0", held_out)] + [(SHUFFLE, "0-2-1", False), (FLIP, "3-0", False)] * 4
    )
    if broken:
        name = pq.read_table(tmp_path / "train.parquet").to_pylist()[0]["images"][0]
        (tmp_path / name).unlink()
    notes = preflight(run_of(), tmp_path / "run")["notes"]
    (note,) = (note for note in notes if "held-out metrics" in note and "shuffle" not in note)
    assert re.search(message, note)
    assert note.count("use other images") == broken  # no advice about a run's own examples


def test_a_task_whose_questions_are_all_held_out_is_named(run_of: Make, tmp_path: Path):
    write(tmp_path, [(FLIP, "3-0", True)] * 2 + [(SHUFFLE, "0-2-1", False)] * 4)
    message = "all records of .* for the task flip are held out: lower data.heldout_fraction"
    with pytest.raises(UserError, match=message):
        open_components(run_of())


@pytest.mark.parametrize("bad", [4, 5])
@pytest.mark.parametrize("where", ["data.source", "sft.responses"])
def test_a_run_stops_above_its_fraction_of_bad_rows(
    run_of: Make, tmp_path: Path, bad: int, where: str
):
    good = 20 - bad
    write(tmp_path, [(FLIP, "3-0", False), (SHUFFLE, "0-2-1", False)] * 10)
    config = run_of()
    if where == "sft.responses":
        rows = [{"instruction": FLIP, "output": "\\boxed{3-0}", "images": ["images/0.png"]}] * good
        (tmp_path / "sft.json").write_text(json.dumps(rows + [{}] * bad))
        Image.fromarray(photo(1, 56, 56)).save(tmp_path / "images/0.png")
        sft = dataclasses.replace(config.sft, responses=str(tmp_path / "sft.json"))
        config = dataclasses.replace(config, sft=sft)
    else:
        rows = pq.read_table(tmp_path / "train.parquet").to_pylist()
        changed = [row | {"answer": ""} for row in rows[:bad]] + rows[bad:]
        pq.write_table(pa.Table.from_pylist(changed), tmp_path / "train.parquet")
    if bad == 4:
        notes = preflight(config, tmp_path / "run")["notes"]
        assert any("4 of 20 questions left out: question" in note for note in notes)
        return
    with pytest.raises(UserError, match=r"5 of 20 questions \(the first: question .*max_bad_fr"):
        open_components(config)
    data = dataclasses.replace(config.data, max_bad_fraction=0.25)
    open_components(dataclasses.replace(config, data=data))

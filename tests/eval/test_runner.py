"""Running benchmarks: answers independent of batch and devices; resuming after a kill; errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spatial_ssrl_jax import evaluate
from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.common.lock import locked
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.eval.benchmarks.registry import SETS, SPECS, open_benchmark
from spatial_ssrl_jax.eval.predictions import read_predictions
from spatial_ssrl_jax.rollout.engine import Engine
from tests.conftest import ROOT
from tests.helpers import benchmark_files as files

SMALL = ("--min-pixels=784", "--max-pixels=3136", "--max-frames=4", "--max-new-tokens=8")
COUNT = 10


def argv(checkpoint: Path, benchmark: str, data: Path, out: Path, *more: str) -> list[str]:
    return [
        f"--model={checkpoint}",
        f"--benchmark={benchmark}",
        f"--data={data}",
        f"--out={out}",
        *SMALL,
        *more,
    ]


def answers(folder: Path) -> dict[str, str]:
    """Responses by question, in the order of the file."""
    lines = (folder / "predictions.jsonl").read_text("utf-8").splitlines()
    predictions = map(json.loads, lines)
    return {f"{r['id']}/{r['meta'].get('sample', 1)}": r["response"] for r in predictions}


@pytest.fixture(scope="module")
def one_device(checkpoint: Path, fourteen: Path, tmp_path_factory) -> Path:
    """All fourteen, asked in this process."""
    out = tmp_path_factory.mktemp("one")
    evaluate.main(argv(checkpoint, "all", fourteen, out))
    return out


@pytest.fixture
def run(run: Callable) -> Callable:
    """`evaluate` as its `__main__` runs it."""
    return partial(run, evaluate.main)


def test_answers_of_a_broken_model_are_not_stored(
    run: Callable, checkpoint: Path, fourteen: Path, tmp_path: Path
):
    shutil.copytree(checkpoint, tmp_path / "m")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], 3e38)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    code, _, err = run(*argv(tmp_path / "m", "realworldqa", fourteen, tmp_path / "out"))
    assert code == 2 and "log-probabilities are not finite" in err
    assert not (tmp_path / "out" / "predictions.jsonl").exists()


@pytest.mark.parametrize("name", SPECS)
def test_each_benchmark_is_asked_and_scored(name: str, one_device: Path, fourteen: Path):
    benchmark = open_benchmark(name, fourteen)
    lines = (one_device / name / "predictions.jsonl").read_text("utf-8").splitlines()
    predictions = [json.loads(line) for line in lines]
    fields = "id benchmark category question target response meta extracted parsed score"
    assert all(list(prediction) == fields.split() for prediction in predictions)
    assert [prediction["id"] for prediction in predictions] == [q.id for q in benchmark.questions]
    assert [prediction["question"] for prediction in predictions] == [
        benchmark.prompt(q).text for q in benchmark.questions
    ]
    assert all(prediction["response"] for prediction in predictions)
    scores = json.loads((one_device / name / "scores.json").read_text())
    assert scores["benchmark"] == name and scores["count"] == len(predictions)
    assert scores["unparsed"] == sum(not prediction["parsed"] for prediction in predictions)


def test_a_set_makes_one_table_in_the_papers_format(one_device: Path):
    tables = json.loads((one_device / "table.json").read_text())
    for table, names in zip(tables, (SETS["spatial"], SETS["general"]), strict=True):
        ours, theirs = table["rows"][-1], table["rows"][-2]
        assert (ours["model"], theirs["model"]) == ("this model", "Spatial-SSRL-7B")
        assert [name for name in ours["figures"] if name != "mean"] == list(names)
        assert list(ours["figures"]) == list(theirs["figures"])
        assert None not in ours["figures"].values()


def start(words: list[str], cache: bool = True, **environment: str) -> subprocess.Popen:
    kept = {k: v for k, v in os.environ.items() if cache or not k.startswith("JAX_COMPILATION")}
    return subprocess.Popen(
        [sys.executable, "-m", "spatial_ssrl_jax.evaluate", *words],
        env=kept | {"JAX_PLATFORMS": "cpu"} | environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_eight_devices_answer_the_same(
    checkpoint: Path, fourteen: Path, one_device: Path, tmp_path: Path
):
    flags = "--xla_force_host_platform_device_count=8"
    words = argv(checkpoint, "all", fourteen, tmp_path, "--fsdp=2", "--tensor=2")
    out, err = (process := start(words, XLA_FLAGS=flags)).communicate(timeout=600)
    assert process.returncode == 0, out + err
    for name in SPECS:
        assert answers(tmp_path / name) == answers(one_device / name), name
    assert "this model" in out and "Spatial-SSRL-7B" in out
    responses = [response for name in SPECS for response in answers(tmp_path / name).values()]
    assert len(set(responses)) > len(responses) / 2, "answers do not depend on what is asked"


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """A multiple choice of images of three sizes, so of several shapes of prompts."""
    rows = [files.mcq_row(i, "AB"[i % 2], hint="Look here. " * 30 * (i % 3)) for i in range(COUNT)]
    return files.write_tsv(tmp_path_factory.mktemp("many") / "RealWorldQA.tsv", rows)


@pytest.fixture(scope="module")
def whole(checkpoint: Path, many: Path, tmp_path_factory) -> Path:
    """What is answered without a stop, one question at a time."""
    out = tmp_path_factory.mktemp("whole")
    evaluate.main(argv(checkpoint, "realworldqa", many, out, "--prompts=1"))
    return out


def test_the_batch_changes_no_answer(checkpoint: Path, many: Path, whole: Path, tmp_path: Path):
    evaluate.main(argv(checkpoint, "realworldqa", many, tmp_path, "--prompts=8"))
    assert answers(tmp_path) == answers(whole)


def test_after_a_kill_the_same_command_resumes(
    run, checkpoint: Path, many: Path, whole: Path, tmp_path: Path, monkeypatch
):
    """Killed outright, and its last line cut off: no question is asked twice, and all are there."""
    path, words = tmp_path / "predictions.jsonl", argv(checkpoint, "realworldqa", many, tmp_path)
    words.append("--prompts=1")
    process = start(words, cache=False)
    end = time.monotonic() + 300
    while not path.is_file() or path.read_bytes().count(b"\n") < 2:
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"id": "half')
    count = kept.count(b"\n")
    asked = []
    generate = Engine.generate
    monkeypatch.setattr(Engine, "generate", lambda *a, **k: asked.append(1) or generate(*a, **k))
    code, out, err = run(*words)
    assert code == 0, err
    assert len(asked) == COUNT - count
    for name in ("predictions.jsonl", "scores.json"):
        assert (tmp_path / name).read_text() == (whole / name).read_text(), name
    asked.clear()
    assert run(*words)[:2] == (0, out) and not asked, "what is answered is scored alone"


def test_one_evaluation_at_a_time_has_a_folder(
    run, checkpoint: Path, many: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("spatial_ssrl_jax.common.lock._HERE_SECONDS", 0.1)
    before = (whole / "predictions.jsonl").read_text()
    with locked(whole, print):
        code, _, err = run(*argv(checkpoint, "realworldqa", many, whole), "--overwrite")
    assert code == 2 and "is in use" in err
    assert (whole / "predictions.jsonl").read_text() == before


def test_answers_of_another_evaluation_are_kept_apart(
    run, checkpoint: Path, many: Path, whole: Path, tmp_path: Path
):
    """Another prompt, other data, or another model; and what is no evaluation at all."""
    before = (whole / "predictions.jsonl").read_text()
    words = argv(checkpoint, "realworldqa", many, whole)
    code, _, err = run(*words, "--reasoning")
    assert code == 2 and "(style 'direct', not 'reasoning')" in err and "--overwrite" in err
    other = files.write_mcq(tmp_path, "RealWorldQA.tsv")
    code, _, err = run(*argv(checkpoint, "realworldqa", other, whole))
    assert code == 2 and "has an answer to" in err and "not asked now" in err
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert open_model(str(copy)).fingerprint() == open_model(str(checkpoint)).fingerprint()
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, _, err = run(*argv(copy, "realworldqa", many, whole))
    assert code == 2 and "answers of another evaluation (weights '" in err
    (whole / "asked.json").rename(whole / "x")
    code, _, err = run(*words)
    assert code == 2 and "predictions.jsonl exists" in err
    (whole / "x").rename(whole / "asked.json")
    assert (whole / "predictions.jsonl").read_text() == before


def test_the_papers_prompts_are_another_evaluation(run, checkpoint: Path, tmp_path: Path):
    """What pandas takes for a missing value is dropped, counted, and stored with the answers."""
    rows = [files.mcq_row(i, "A", C=text) for i, text in enumerate(["None", "N/A", "stool"])]
    data, out = files.write_tsv(tmp_path / "BLINK.tsv", rows), tmp_path / "out"
    words = argv(checkpoint, "blink", data, out)
    code, _, err = run(*words, "--paper-prompts")
    assert code == 0 and 'BLINK: options such as "None" are dropped in 2 questions' in err
    stored = read_predictions(out / "predictions.jsonl")
    assert [p.meta.get("dropped") for p in stored] == ["C", "C", None]
    assert ["C. " in p.question for p in stored] == [False, False, True]
    assert json.loads((out / "asked.json").read_text())["paper_prompts"] is True
    code, _, err = run(*words)
    assert code == 2 and "(paper_prompts True, not None)" in err
    code, _, err = run(*words, "--overwrite")
    assert code == 0 and "dropped" not in err
    assert "paper_prompts" not in json.loads((out / "asked.json").read_text())


def test_samples_do_not_depend_on_the_batch(run, checkpoint: Path, tmp_path: Path):
    data = files.write_mcq(tmp_path, "RealWorldQA.tsv")
    for prompts in (1, 4):
        words = argv(
            checkpoint, "realworldqa", data, tmp_path / str(prompts), f"--prompts={prompts}"
        )
        code, out, err = run(*words, "--samples=2", "--temperature=1", "--json")
        assert code == 0, err
        assert json.loads(out)["count"] == 4
    found = answers(tmp_path / "1")
    assert found == answers(tmp_path / "4")
    assert list(found)[:3] == ["0/1", "0/2", "1/1"] and len(set(found.values())) == 8


def test_what_cannot_be_read_is_named_or_left_out(run, checkpoint: Path, tmp_path: Path):
    """One image is damaged from its start, and one after its header, which is met later."""
    path = files.write_viewspatial(tmp_path)
    for name, content in (("a/0.jpg", b"nothing"), ("b/1.jpg", files.png(1)[:-30])):
        (tmp_path / "ViewSpatial-Bench" / name).unlink()
        (tmp_path / "ViewSpatial-Bench" / name).write_bytes(content)
    rows = json.loads(path.read_text())
    extra = {**rows[0], "image_path": ["ViewSpatial-Bench/a/1.jpg"]}
    files.write_json(path, [*rows, extra])
    words = argv(checkpoint, "viewspatial", path, tmp_path / "out")
    code, _, err = run(*words)
    assert code == 2 and "question '0' of viewspatial" in err and "a/0.jpg" in err
    assert "--allow-missing" in err and err.count("error:") == 1
    code, out, err = run(*words, "--allow-missing", "--json")
    assert code == 0, err
    assert json.loads(out)["count"] == 1 and list(answers(tmp_path / "out")) == ["2/1"]
    assert "ViewSpatial: 2 left out, the first: question '0'" in err


def test_answers_that_a_server_scores_become_its_file(run, checkpoint: Path, tmp_path: Path):
    data = files.write_mmbench(tmp_path, "MMBench_TEST_EN_V11.tsv", answer=False)
    code, out, err = run(*argv(checkpoint, "mmbench", data, tmp_path / "out"))
    assert (code, out) == (0, "") and "4 answers without a public target" in err
    lines = (tmp_path / "out" / "submission.tsv").read_text("utf-8").splitlines()
    assert len(lines) == 5 and not (tmp_path / "out" / "scores.json").exists()


def test_sizes_are_known_from_headers_alone(fourteen: Path, checkpoint: Path):
    """The size that a prompt is planned with is the one that it has."""
    from spatial_ssrl_jax.data.videos import measure_video, open_video

    model = open_model(str(checkpoint))
    processor = Processor(model.files, model.config, 784, 3136)
    clip = fourteen / "vsi_bench" / "rooms" / "1.mp4"
    size, video = measure_video(clip, max_frames=4), open_video(clip, max_frames=4)
    assert size == (4, 60, 80) == video.frames.shape[:3]
    for name in ("blink", "qspatial_plus", "viewspatial"):
        for image in open_benchmark(name, fourteen).questions[-1].images:
            assert image.size() == image.open().shape[:2] == (30, 40)
    image = np.zeros((30, 40, 3), np.uint8)
    for question in ("Where?", "<video> and <image>"):
        planned = processor.measure([image.shape[:2]], question, [size])
        prompt = processor.prompt(question, [image], [video])
        assert (planned.tokens, planned.patches) == (len(prompt.ids), len(prompt.frame))


def test_a_prompt_that_is_too_long_is_named(run, checkpoint: Path, many: Path, tmp_path: Path):
    config = json.loads((checkpoint / "config.json").read_text())
    short = tmp_path / "short"
    short.mkdir()
    for file in checkpoint.iterdir():
        (short / file.name).write_bytes(file.read_bytes())
    for part in (config, config.get("text_config", {})):
        if "max_position_embeddings" in part:
            part["max_position_embeddings"] = 100
    (short / "config.json").write_text(json.dumps(config))
    code, _, err = run(*argv(short, "realworldqa", many, tmp_path / "out"))
    assert code == 2 and "of realworldqa takes" in err and "at most 92 fit" in err
    assert not (tmp_path / "out").exists()


def test_pretext_tasks_are_beside_chance(run, checkpoint: Path, tmp_path: Path):
    """Asked as in training, over held-out images; what was asked can be scored again."""
    words = [f"--model={checkpoint}", "--benchmark=pretext", "--source=scenes:40:224x224"]
    words += [f"--out={tmp_path / 'out'}", *SMALL, "--examples=3", "--reasoning"]
    code, out, err = run(*words, "--heldout-fraction=0.2")
    assert code == 0, err
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["count"] == 15
    tasks = {name.partition("/")[0] for name in scores["categories"]}
    assert tasks == {"shuffle", "flip", "crop", "depth", "position"}
    assert scores["extra"]["chance/flip"] == 12.5 and scores["extra"]["chance/crop"] == 25
    assert "(chance 25.00)" in out and "the paper" not in out
    code, again, err = run(f"--score={tmp_path / 'out' / 'predictions.jsonl'}")
    assert (code, again) == (0, out), err


def test_a_set_leaves_out_what_has_no_file_only_when_told(
    run, checkpoint: Path, tmp_path: Path, monkeypatch
):
    files.write_mcq(tmp_path, "RealWorldQA.tsv")
    words = argv(checkpoint, "general", tmp_path, tmp_path / "out", "--json")
    code, _, err = run(*words)
    assert code == 2 and "has no file of MMBench" in err
    code, out, err = run(*words, "--allow-missing")
    assert code == 0, err
    assert [s["benchmark"] for s in json.loads(out)["scores"]] == ["realworldqa"]
    assert "BLINK is left out" in err

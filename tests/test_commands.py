"""The commands: what they leave and print, and one sentence with exit code 2 on bad input."""

import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import ExifTags, Image
from safetensors.numpy import load_file, save_file

from spatial_ssrl_jax import convert, generate, preview, train
from spatial_ssrl_jax.checkpoint.export import export
from spatial_ssrl_jax.checkpoint.models import ModelFolder, open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.outputs import atomic_folder
from spatial_ssrl_jax.common.text import printable
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.inference.policy import Policy
from spatial_ssrl_jax.qwen_vl.lora import LoraSettings
from spatial_ssrl_jax.qwen_vl.model import init_adapters
from spatial_ssrl_jax.qwen_vl.peft import write_adapter
from spatial_ssrl_jax.tasks import TASKS_BY_NAME
from tests.conftest import ROOT, random_params

TRUTH = {
    "shuffle": {"rows", "cols", "permutation", "masked"},
    "flip": {"patch", "direction"},
    "crop": {"box", "options"},
    "depth": {"points", "depths", "half"},
    "position": {"points", "depths", "camera", "heading", "kind"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights drawn at random, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    tiny = open_model("tiny")
    export(tiny, random_params(tiny.config, seed=1), folder, "bfloat16")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in "ab":
        image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        image.resize((112, 84)).save(folder / f"{name}.png")
    return folder


def assert_refused(result: tuple[int, str, str], *named: str) -> None:
    """Exit code 2, and on stderr one sentence that holds each of the words."""
    code, out, err = result
    assert code == 2 and out in ("", "opening the model and the images\n")
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith((".\n", "?\n")), err
    assert all(str(word) in err for word in named), err


# preview


def test_preview_leaves_examples_with_their_images_and_truth(run, tmp_path: Path):
    out = tmp_path / "p"
    code, printed, _ = run(
        preview.main, "--source=scenes:30:224x224", f"--out={out}", "--count=10", "--json"
    )
    assert code == 0
    assert json.loads(printed)["tasks"] == dict.fromkeys(TRUTH, 2)
    rows = [json.loads(line) for line in (out / "examples.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == 10
    for row in rows:
        assert list(row) == ["id", "task", "question", "answer", "images", "source", "truth"]
        assert set(row["truth"]) == TRUTH[row["task"]]
        assert set(row["source"]) == {"spec", "record", "image"}
        assert row["source"]["spec"] == "scenes:30:224x224" and row["answer"]
        for name in row["images"]:
            with Image.open(out / name) as image:
                assert image.format == "PNG" and image.mode == "RGB"
                image.load()
    written = {f"images/{path.name}" for path in (out / "images").iterdir()}
    assert written == {name for row in rows for name in row["images"]}
    page = (out / "index.html").read_text()
    assert page.count("<article") == 10 and all(name in page for name in written)


def test_preview_shows_sources_gaps_and_a_configs_settings(run, tmp_path: Path):
    spec, out = "depth@scenes:30:224x224+depth@3*scenes:20:224x224+flip@scenes:9", tmp_path / "p"
    argv = [f"--source={spec}", f"--out={out}", "--count=24", "--tasks=depth", "--json"]
    code, printed, _ = run(preview.main, *argv, "--config.tasks.depth.fit_box=(300,300)")
    report = json.loads(printed)
    shares = {"scenes:30:224x224": 0.25, "scenes:20:224x224": 0.75}
    assert code == 0 and report["sources"] == {"depth": shares}
    rows = [json.loads(line) for line in (out / "examples.jsonl").read_text().splitlines()]
    drawn = [row["source"]["spec"] for row in rows]
    assert 1 <= drawn.count("scenes:30:224x224") < 12 and len(drawn) == 24
    with Image.open(out / rows[0]["images"][0]) as image:
        assert image.size == (300, 300)
    page = (out / "index.html").read_text()
    assert "<td>scenes:20:224x224</td><td>75%</td>" in page
    gaps = [min(np.diff(sorted(row["truth"]["depths"]))) for row in rows]
    assert f"<td>0.1 to 0.2</td><td>{np.histogram(gaps, (0.1, 0.2))[0][0]}</td>" in page


def test_preview_follows_its_seed(run, tmp_path: Path):
    def lines(name: str, seed: int) -> str:
        out = tmp_path / name
        argv = [
            "--source=scenes:9",
            f"--out={out}",
            "--count=4",
            "--tasks=flip,shuffle",
            f"--seed={seed}",
        ]
        assert run(preview.main, *argv)[0] == 0
        return (out / "examples.jsonl").read_text()

    assert lines("a", 1) == lines("b", 1) != lines("c", 2)


@pytest.mark.parametrize("task", [name for name, task in TASKS_BY_NAME.items() if task.needs_depth])
def test_preview_of_a_depth_task_without_depth_is_refused(
    run, images: Path, tmp_path: Path, task: str
):
    source = f"folder:{images}"
    result = run(preview.main, f"--source={source}", f"--out={tmp_path / 'p'}", f"--tasks={task}")
    assert_refused(result, task, source, "depth")
    assert not (tmp_path / "p").exists()


def test_preview_names_what_it_does_not_know(run, tmp_path: Path):
    out = f"--out={tmp_path / 'p'}"
    assert_refused(run(preview.main, "--source=scene", out), "'scene'", "did you mean 'scenes'")
    assert_refused(run(preview.main, "--source=folder:/nowhere", out), "folder:/nowhere")
    assert_refused(run(preview.main, "--source=scenes", out, "--tasks=flop"), "unknown task flop")
    assert_refused(run(preview.main, "--source=scenes", out, "--count=0"), "--count")


def test_preview_overwrites_only_when_told_and_never_its_source(run, images: Path, tmp_path: Path):
    out = tmp_path / "out"
    argv = ["--source=scenes:5", f"--out={out}", "--count=1", "--tasks=shuffle"]
    assert run(preview.main, *argv)[0] == 0
    (out / "notes.txt").write_text("mine")
    assert_refused(run(preview.main, *argv), str(out), "--overwrite")
    assert (out / "notes.txt").exists()
    assert run(preview.main, *argv, "--overwrite")[0] == 0
    assert not (out / "notes.txt").exists() and (out / "index.html").exists()
    argv = [f"--source=folder:{images}", f"--out={images}", "--overwrite"]
    assert_refused(run(preview.main, *argv), str(images), "holds what is read")
    assert (images / "a.png").is_file()


def test_preview_counts_an_unreadable_image_and_continues(run, images: Path, tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "bad.png").write_text("no image")
    argv = [f"--source=folder:{folder}", f"--out={tmp_path / 'p'}", "--count=2", "--tasks=shuffle"]
    assert_refused(run(preview.main, *argv), "gave no example", "bad.png")
    image = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(image).resize((224, 224)).save(folder / "good.png")
    code, printed, _ = run(preview.main, *argv, "--count=6", "--json", "--overwrite")
    report = json.loads(printed)
    assert code == 0 and report["tasks"] == {"shuffle": 6}
    assert any("bad.png" in reason for reason in report["rejected"])


# convert


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_convert_there_and_back_is_bit_exact(run, model: Path, tmp_path: Path):
    code, printed, _ = run(convert.main, "to-orbax", model, tmp_path / "orbax", "--json")
    assert code == 0 and json.loads(printed)["dtype"] == "bfloat16"
    code, printed, _ = run(convert.main, "to-hf", tmp_path / "orbax", tmp_path / "hf", "--json")
    assert code == 0 and json.loads(printed)["dtype"] == "bfloat16"
    assert weights_of(model) and weights_of(tmp_path / "hf") == weights_of(model)
    assert {p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir()} == {
        p.name: p.read_bytes() for p in model.iterdir()
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "orbax"]


def test_convert_looks_for_room_first(run, model: Path, tmp_path: Path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    for direction in ("to-hf", "to-orbax"):
        result = run(convert.main, direction, model, tmp_path / "out")
        assert_refused(result, str(tmp_path / "out"), "needs 4.46 MB", "1 MB left")
    assert not (tmp_path / "out").exists()


def test_convert_names_what_is_wrong(run, model: Path, tmp_path: Path):
    assert_refused(run(convert.main, "to-orbax", "/nowhere/m", tmp_path / "x"), "/nowhere/m")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for argv in ((), ("--overwrite",)):
        result = run(convert.main, "to-orbax", model, tmp_path / "full", *argv)
        assert_refused(result, "full", "was not written by this package")
    assert_refused(run(convert.main, "to-hf", model, model, "--overwrite"), "holds what is read")
    assert weights_of(model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize("direction", ["to-orbax", "to-hf"])
def test_convert_of_a_broken_model_leaves_nothing(run, model: Path, tmp_path: Path, direction: str):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert_refused(run(convert.main, direction, broken, tmp_path / "out"), "model.safetensors")
    with atomic_folder(tmp_path / "full") as partial:
        (partial / "old.txt").write_text("old")
    argv = [direction, broken, tmp_path / "full", "--overwrite"]
    assert_refused(run(convert.main, *argv), "model.safetensors")
    assert (tmp_path / "full" / "old.txt").is_file()
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_vl"}))
    assert_refused(run(convert.main, direction, broken, tmp_path / "out"), "model_type", "qwen3_vl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "full"]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Adapters of the tiny model whose `lora_b` is not zero."""
    config = open_model("tiny").config
    adapters = init_adapters(config, LoraSettings(2), jax.random.key(0))
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", config, jax.tree.map(lambda x: x + 0.1, adapters), "base")
    return tmp_path / "adapter"


def test_merge_lora_writes_the_merged_model(run, model: Path, adapter: Path, tmp_path: Path):
    argv = ["merge-lora", model, adapter, tmp_path / "merged"]
    code, printed, _ = run(convert.main, *argv, "--json", "--dtype=float32")
    assert code == 0 and json.loads(printed)["dtype"] == "float32"
    base = load_file(model / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        wanted = base[name].astype(np.float32)
        module = "base_model.model.model.language_model." + name.removeprefix("model.")
        a, b = (tensors.get(module.replace("weight", f"lora_{x}.weight")) for x in "AB")
        assert (a is None) == ("_proj.weight" not in name or name.startswith("visual"))
        # 2.1 is the scale, which the fixture raised as well.
        wanted = wanted if a is None else wanted + 2.1 * b @ a
        np.testing.assert_allclose(tensor, wanted, rtol=1e-5, atol=1e-6)


def test_merge_lora_names_what_is_wrong(run, model: Path, adapter: Path, tmp_path: Path):
    target = tmp_path / "merged"
    assert_refused(run(convert.main, "merge-lora", model, "/nowhere/a", target), "/nowhere/a")
    argv = ["merge-lora", model, adapter, adapter, "--overwrite"]
    assert_refused(run(convert.main, *argv), "holds what is read")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"r": 5}))
    result = run(convert.main, "merge-lora", model, adapter, target)
    assert_refused(result, str(adapter), "lora_A.weight has shape (2, 128)", "(5, 128)")
    assert not target.exists() and (adapter / "adapter_config.json").is_file()


# generate


@pytest.fixture
def ask(run, model: Path, images: Path) -> Callable:
    def call(*argv: str) -> dict:
        image = f"--image={images / 'a.png'}"
        code, printed, _ = run(
            generate.main,
            f"--model={model}",
            image,
            "--question=Where?",
            "--max-new-tokens=16",
            "--json",
            *argv,
        )
        assert code == 0
        return json.loads(printed)

    return call


def test_generate_is_greedy_and_the_same_twice(ask, model: Path):
    answer = ask()
    assert list(answer) == ["prompt_ids", "samples"] and len(answer["samples"]) == 1
    (sample,) = answer["samples"]
    assert set(sample) == {"ids", "logprobs", "text", "finished"}
    assert 1 <= len(sample["ids"]) == len(sample["logprobs"]) <= 16
    assert all(p <= 0 for p in sample["logprobs"]) and isinstance(sample["finished"], bool)
    image_token = open_model(str(model)).config.image_token_id
    assert answer["prompt_ids"].count(image_token) == 12  # 112 x 84 pixels: 4 x 3 merged patches
    assert ask() == answer
    assert ask("--seed=9") == answer


def test_generate_draws_samples_by_their_seed(ask):
    argv = ["--samples=2", "--temperature=1", "--seed=3"]
    first = ask(*argv)
    assert len(first["samples"]) == 2
    assert first["samples"][0]["ids"] != first["samples"][1]["ids"]
    assert ask(*argv) == first
    assert ask(*argv[:2], "--seed=4")["samples"] != first["samples"]


def test_generate_takes_several_images_and_the_format_prompt(ask, images: Path):
    alone = ask()["prompt_ids"]
    two = ask(f"--image={images / 'b.png'}")["prompt_ids"]
    assert len(two) == len(alone) + 14  # 12 places and the two marks around them
    assert len(ask("--reasoning")["prompt_ids"]) == len(alone) + 2  # a space, and one token


def test_generate_ends_where_log_probabilities_are_not_finite(
    run, images: Path, model: Path, tmp_path: Path
):
    shutil.copytree(model, tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], 3e38)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    argv = [f"--model={tmp_path / 'm'}", f"--image={images / 'a.png'}", "--question=Where?"]
    result = run(generate.main, *argv, "--max-new-tokens=16", "--json")
    assert_refused(result, "log-probabilities are not finite", "try another model")


def test_generate_reads_an_orbax_folder_alike(ask, run, model: Path, tmp_path: Path):
    assert run(convert.main, "to-orbax", model, tmp_path / "o")[0] == 0
    assert ask(f"--model={tmp_path / 'o'}") == ask()


def test_images_are_read_before_the_weights(run, model: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(ModelFolder, "load", refuse)
    argv = [f"--model={model}", "--image=/nowhere/x.png", "--question=Where?"]
    assert_refused(run(generate.main, *argv), "/nowhere/x.png")


def test_an_image_is_turned_upright_and_one_prompt_is_not_a_batch(model: Path):
    policy, pixels = Policy.open(model), np.zeros((56, 84, 3), np.uint8)
    pixels[:, :42] = 255
    turned = Image.fromarray(np.rot90(pixels).copy())
    exif = turned.getexif()
    exif[ExifTags.Base.Orientation] = 6  # shown after a quarter turn clockwise
    file = io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    (found,) = policy.respond("Where?", [Image.open(file)], max_new_tokens=8)
    (wanted,) = policy.respond("Where?", [pixels], max_new_tokens=8)
    np.testing.assert_array_equal(found.logprobs, wanted.logprobs)
    split = dataclasses.replace(policy, layout=SimpleNamespace(batch_shards=2))
    with pytest.raises(UserError, match="over 2 shards of a batch: open the policy with mesh="):
        split.respond("Where?", max_new_tokens=8)


def test_the_python_example_runs(model: Path, images: Path, capsys: pytest.CaptureFixture):
    """The lines of BUILD.md, with a model and an image that exist here."""
    text = (ROOT / "BUILD.md").read_text()
    (code,) = re.findall(r"```python\n(from PIL.*?)```", text, re.DOTALL)
    paths = {"runs/tiny/export": str(model), "photo.jpg": str(images / "a.png")}
    for name, path in paths.items():
        assert code.count(name) == 1
        code = code.replace(name, path)
    found: dict = {}
    exec(code, found)
    assert capsys.readouterr().out.count("Reward(overall=") == 4
    responses = found["responses"]
    assert len(responses) == 4 and len({r.text for r in responses}) > 1
    assert all(len(r.ids) == len(r.logprobs) <= 64 and r.ids.dtype == np.int32 for r in responses)
    right = "<think>x</think>\\boxed{left}"
    assert found["score_answer"](right, answer="left").overall == 1.0


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds at 4 frames a second, 56 x 84 pixels."""
    av = pytest.importorskip("av", reason="writes a video, which needs PyAV")
    path = tmp_path_factory.mktemp("clip") / "v.mp4"
    rng = np.random.default_rng(0)
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.height, stream.width, stream.pix_fmt = 56, 84, "yuv420p"
        for _ in range(8):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (56, 84, 3), np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_generate_takes_images_and_a_video(ask, clip: Path, model: Path):
    """Four frames of eight are two times of 2 x 3 tokens; all eight are four."""
    token = open_model(str(model)).config.video_token_id
    answer = ask(f"--video={clip}")
    assert answer["prompt_ids"].count(token) == 2 * 6
    every = ask(f"--video={clip}", "--fps=4")
    assert every["prompt_ids"].count(token) == 4 * 6
    assert every["samples"] != answer["samples"]
    few = ask(f"--video={clip}", "--fps=4", "--max-frames=2", "--max-pixels=784")
    assert few["prompt_ids"].count(token) == 1


def test_generate_prints_the_text_as_it_comes(run, ask, model: Path, images: Path):
    """What is streamed and what follows it is each sample's whole text."""
    texts = [sample["text"] for sample in ask("--samples=2", "--temperature=1")["samples"]]
    argv = [f"--model={model}", f"--image={images / 'a.png'}", "--question=Where?"]
    argv += ["--max-new-tokens=16", "--samples=2", "--temperature=1"]
    code, printed, _ = run(generate.main, *argv)
    first, second = printed.removeprefix("--- sample 1\n").split("--- sample 2\n")
    assert code == 0 and all(texts)
    wanted = [printable(text) + " […]" for text in texts]
    assert [first.rstrip("\n"), second.rstrip("\n")] == wanted


def test_stream_holds_back_half_a_character(capsys: pytest.CaptureFixture):
    """Token by token, the byte-level tokens of a sign among them, the text comes out whole."""
    tiny = open_model("tiny")
    processor = Processor(tiny.files, tiny.config)
    ids = processor.encode_response("naïve 🙂 \\boxed{↑}")[:-1]
    stream, parts = generate.TextStream(processor, max_tokens=len(ids)), []
    for length in range(1, len(ids) + 1):
        stream(ids[None, None], np.array([[length]]))
        parts.append(capsys.readouterr().out)
    assert "" in parts and len(parts) > 10
    assert "".join(parts) == "naïve 🙂 \\boxed{↑}" and stream.shown == len("".join(parts))


def test_a_model_cannot_steer_the_terminal(capsys: pytest.CaptureFixture):
    tiny = open_model("tiny")
    processor = Processor(tiny.files, tiny.config)
    ids = processor.encode_response("a\x1b]0;title\x07\x1b[2Jb\n\tc")[:-1]
    generate.TextStream(processor, max_tokens=len(ids))(ids[None, None], np.array([[len(ids)]]))
    assert capsys.readouterr().out == "a\\x1b]0;title\\x07\\x1b[2Jb\n\tc"


def test_generate_refuses_a_prompt_that_is_too_long(run, model: Path, images: Path):
    argv = [f"--model={model}", f"--image={images / 'a.png'}", "--question=Where?"]
    most = open_model(str(model)).config.text.max_position_embeddings
    for limit in ("--max-prompt-tokens=20", f"--max-new-tokens={most - 20}"):
        assert_refused(run(generate.main, *argv, limit), "tokens", "12 of them", "at most 20 fit")


def test_generate_names_what_is_wrong(run, model: Path, tmp_path: Path):
    (tmp_path / "x.png").write_text("no image")
    question = "--question=Where?"
    assert_refused(run(generate.main, "--model=/nowhere/m", question), "model folder /nowhere/m")
    for name in ("x.png", "absent.png"):
        image = tmp_path / name
        assert_refused(
            run(generate.main, f"--model={model}", f"--image={image}", question), str(image)
        )
    assert_refused(run(generate.main, f"--model={model}", question, "--samples=0"), "--samples")
    assert_refused(run(generate.main, f"--model={model}", question, "--top-p=0"), "--top-p")
    assert_refused(run(generate.main, f"--model={model}", question, "--fps=0"), "--fps")
    assert_refused(
        run(generate.main, f"--model={model}", question, "--max-pixels=0"), "--max-pixels"
    )
    video = f"--video={tmp_path / 'x.png'}"
    assert_refused(run(generate.main, f"--model={model}", video, question), "x.png", "video")
    assert_refused(run(generate.main, "--model=tiny", question), "safetensors")


# train


def test_train_names_a_bad_config_before_anything_is_built(run, tmp_path: Path):
    tiny = f"--config={ROOT / 'configs' / 'tiny.py'}"
    workdir = f"--workdir={tmp_path / 'w'}"
    assert_refused(run(train.main, "--config=/nowhere/c.py", workdir), "/nowhere/c.py")
    result = run(train.main, tiny, workdir, "--config.grpo.stepps=3")
    assert_refused(result, "config.grpo.stepps", "did you mean steps?")
    assert_refused(run(train.main, tiny, workdir, "--config.grpo.steps=x"), "config.grpo.steps=x")
    assert not (tmp_path / "w").exists()


def test_train_leaves_a_folder_that_is_not_its_own_alone(run, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    result = run(train.main, f"--config={ROOT / 'configs' / 'tiny.py'}", f"--workdir={tmp_path}")
    assert_refused(result, str(tmp_path), "was not written by this package")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# the whole way, as a process


@pytest.mark.parametrize("debug", [False, True])
def test_a_process_says_one_sentence_and_a_traceback_only_with_debug(debug: bool):
    command = [sys.executable, "-m", "spatial_ssrl_jax.train", "--config=/nowhere/c.py"]
    done = subprocess.run(command + ["--debug"] * debug, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    *before, last = done.stderr.splitlines()
    assert last.startswith("error: the config file /nowhere/c.py does not exist")
    assert ("Traceback" in done.stderr) == debug == bool(before)

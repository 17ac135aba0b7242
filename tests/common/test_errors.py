"""Every error that a user can cause at the commands: one sentence, exit code 2, no traceback."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spatial_ssrl_jax import bench, convert, evaluate, generate, plan, prepare, preview, train
from spatial_ssrl_jax.checkpoint.export import export
from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.common.errors import UserError, run_command
from tests.conftest import ROOT, random_params

TINY = f"--config={ROOT / 'configs' / 'tiny.py'}"
ASK = ("--model=MODEL", "--question=Where?")
ASKED = ("--model=MODEL", "--out=DIR/x", "--data=DIR/empty")
PRETEXT = ("--benchmark=pretext", *ASKED[:2])
BENCH = ("--model=tiny", "--random-weights")
# What a sentence tells to try next begins or continues with one of these.
NEXT = re.compile(
    r"\b(give|choose|set|use|check|copy|fetch|fix|raise|lower|write|add|change|free|expected|must|"
    r"did you mean|install|leave|remove|save|merge|known here|needs)\b"
)


def train_with(*overrides: str) -> list[str]:
    return [TINY, "--workdir=DIR/w", *(f"--config.{o}" for o in overrides)]


# The command, its arguments (DIR, MODEL and IMAGE stand for paths), and what the sentence names.
CASES: list[tuple[Callable, Sequence[str], Sequence[str]]] = [
    # train: the config
    (train.main, ["--config=/nowhere/c.py"], ["/nowhere/c.py does not exist"]),
    (train.main, ["--config=DIR/broken.py"], ["broken.py", "SyntaxError"]),
    (train.main, ["--config=DIR/none.py"], ["none.py", "get_config"]),
    (train.main, ["--config=DIR/number.py"], ["number.py", "gives int"]),
    (train.main, ["--config=IMAGE"], ["a.png", "no Python file"]),
    (train.main, [TINY, "--config.grpo.steps"], ["--config.grpo.steps has no value"]),
    (plan.main, [TINY, "--topology=v9z:2x2"], ["v9z:2x2 is not known"]),
    (plan.main, [TINY, "--topology=v5p:4x4"], ["has 2 axes"]),
    (plan.main, [TINY, "--topology=cpu", "--config.mesh.fsdp=1000"], ["mesh data=1 x fsdp=1000"]),
    (train.main, train_with("grpo.stepps=3"), ["grpo.stepps", "did you mean steps?"]),
    (train.main, train_with("gpro.steps=3"), ["gpro.steps", "did you mean grpo?"]),
    (train.main, train_with("grpo.steps=x"), ["grpo.steps=x", "expected int"]),
    (train.main, train_with("grpo=3"), ["config.grpo is a section"]),
    (train.main, train_with("grpo.steps.x=3"), ["grpo.steps.x goes too deep"]),
    (train.main, train_with("data.prompt_buckets=(a,)"), ["data.prompt_buckets"]),
    (train.main, train_with("grpo.kl_estimator=k9"), ["grpo.kl_estimator=k9", "k1, k2, k3"]),
    (train.main, train_with("grpo.group_size=1"), ["grpo.group_size"]),
    (
        train.main,
        train_with("grpo.minibatches_per_rollout=3"),
        ["grpo.minibatches_per_rollout=3 must divide"],
    ),
    (train.main, train_with("seed=-1"), ["seed=-1"]),
    (train.main, train_with("eval.every=-1"), ["eval.every=-1"]),
    (train.main, train_with("eval.benchmark=blink"), ["eval.benchmark=blink needs its files"]),
    (train.main, train_with("eval.benchmark_every=5"), ["do nothing without a benchmark"]),
    (train.main, train_with("checkpoint.best=benchmark"), ["checkpoint.best=benchmark", "heldout"]),
    (train.main, train_with("checkpoint.best=most"), ["checkpoint.best=most is unknown"]),
    (train.main, train_with("sft.freeze=all"), ["sft.freeze=all"]),
    (train.main, train_with("tasks.shuffle.weight=0"), ["every task has weight 0"]),
    (train.main, train_with("sft.steps=0", "grpo.steps=0"), ["nothing to train"]),
    # train: what the config names
    (train.main, train_with("data.source=scene"), ["'scene'", "did you mean 'scenes'"]),
    (train.main, train_with("data.source=folder:/nowhere"), ["folder:/nowhere"]),
    (train.main, train_with("data.source=folder:DIR/empty"), ["found no image"]),
    (
        train.main,
        [*train_with(), "--workdir=gs://bucket"],
        ["gs://bucket is no folder in a bucket"],
    ),
    (train.main, [*train_with(), "--workdir=s3://bucket/run"], ["s3://bucket/run", "give gs://"]),
    (
        train.main,
        [
            "--check",
            *train_with("data.source=scenes:9", "data.prompt_buckets=9", "data.patch_buckets=64"),
        ],
        ["fits 9 tokens", "data.prompt_buckets"],
    ),
    (
        train.main,
        train_with("data.source=folder:IMAGES", "tasks.depth.weight=1"),
        ["the task depth needs depth"],
    ),
    (train.main, train_with("sft.responses=/nowhere"), ["ssrl81k:/nowhere"]),
    (train.main, train_with("model.path=/nowhere/m"), ["model folder /nowhere/m"]),
    (train.main, train_with("model.path=DIR/empty"), ["empty/config.json is missing"]),
    (train.main, train_with("model.from_scratch=False"), ["safetensors"]),
    (
        train.main,
        train_with("sft.steps=0", "grpo.init_from=/nowhere/m"),
        ["model folder /nowhere/m"],
    ),
    (train.main, train_with("mesh.fsdp=7"), ["fsdp=7 x tensor=1 does not fit"]),
    (
        train.main,
        train_with("mesh.heartbeat_timeout=0"),
        ["mesh.heartbeat_timeout=0 must be at least 1"],
    ),
    (train.main, train_with("model.attention=flash"), ["attention=flash", "xla, splash, cudnn"]),
    (train.main, train_with("rollout.attention=cudnn"), ["attention=cudnn", "auto, xla, triton"]),
    (
        plan.main,
        [TINY, "--topology=h100", "--config.rollout.attention=triton"],
        ["triton cannot be planned without the GPU"],
    ),
    (
        plan.main,
        [TINY, "--topology=h100", "--config.model.attention=cudnn"],
        ["model.attention=cudnn cannot be planned without the GPU"],
    ),
    (train.main, train_with("model.attention=splash"), ["attention=splash runs only on TPUs"]),
    (train.main, train_with("model.attention=cudnn"), ["attention=cudnn runs only on NVIDIA GPUs"]),
    (
        plan.main,
        [TINY, "--topology=cpu", "--config.model.attention=splash"],
        ["attention=splash runs only on TPUs"],
    ),
    # train: where it writes, and how it is called
    (train.main, [TINY, "--workdir=DIR"], ["is not empty", "choose another folder"]),
    (train.main, [TINY, "--workdir=IMAGE/w"], ["nothing can be written to", "is a file"]),
    (train.main, [TINY, "--workdir=DIR/damaged"], ["config.json is not valid JSON"]),
    (train.main, [TINY, "--json"], ["--json belongs to --check"]),
    (train.main, [TINY, "--processes=2"], ["belong together"]),
    # preview
    (preview.main, ["--source=scene", "--out=DIR/p"], ["'scene'", "did you mean 'scenes'"]),
    (preview.main, ["--source=scenes:0", "--out=DIR/p"], ["number of scenes"]),
    (preview.main, ["--source=0*scenes+scenes", "--out=DIR/p"], ["weight"]),
    (preview.main, ["--source=IMAGES", "--out=DIR/p"], ["did you mean 'folder:"]),
    (preview.main, ["--source=ssrl81k:IMAGE", "--out=DIR/p"], ["a.png"]),
    (preview.main, ["--source=tfds:nothing@DIR", "--out=DIR/p"], ["tfds:nothing"]),
    (preview.main, ["--source=arrayrecord:DIR/*", "--out=DIR/p"], ["features.json"]),
    (preview.main, ["--source=scenes", "--out=DIR"], ["not empty"]),
    (preview.main, ["--source=scenes", "--out=IMAGE/p"], ["a.png/p"]),
    (preview.main, ["--source=scenes", "--out=DIR/p", "--tasks=flop"], ["unknown task flop"]),
    (preview.main, ["--source=scenes", "--out=DIR/p", "--count=0"], ["--count"]),
    (preview.main, ["--source=scenes", "--out=DIR/p", "--seed=-1"], ["--seed"]),
    # generate
    (generate.main, ["--model=/nowhere/m", ASK[1]], ["model folder /nowhere/m"]),
    (generate.main, ["--model=tiny", ASK[1]], ["safetensors"]),
    (generate.main, ["--model=DIR/listed", ASK[1]], ["config.json has no model_type"]),
    (generate.main, ["--model=DIR/odd", ASK[1]], ["config.json holds a wrong value"]),
    (generate.main, ["--model=DIR/wordless", ASK[1]], ["the tokenizer in", "wordless"]),
    (generate.main, ["--model=DIR/cut", ASK[1]], ["model.safetensors cannot be read"]),
    (generate.main, [*ASK, "--image=/nowhere/x.png"], ["/nowhere/x.png"]),
    (generate.main, [*ASK, "--image=DIR"], ["is no file; give one with an image"]),
    (generate.main, [*ASK, "--video=DIR/broken.py"], ["broken.py"]),
    (generate.main, [*ASK, "--samples=0"], ["--samples"]),
    (generate.main, [*ASK, "--fps=nan"], ["--fps"]),
    (generate.main, [*ASK, "--temperature=nan"], ["--temperature"]),
    (generate.main, [*ASK, "--seed=-1"], ["--seed"]),
    (generate.main, [*ASK, "--max-pixels=1"], ["smallest image area"]),
    (generate.main, [*ASK, "--max-prompt-tokens=3"], ["at most 3 fit"]),
    (generate.main, [*ASK[:1], "--question=<image>"], ["placeholders for 1 image"]),
    (generate.main, [*ASK[:1], "--question=<|image_pad|>"], ["image token"]),
    # convert
    (convert.main, ["to-orbax", "/nowhere/m", "DIR/x"], ["/nowhere/m"]),
    (convert.main, ["to-orbax", "MODEL", "DIR"], ["is not empty"]),
    (convert.main, ["to-orbax", "MODEL", "IMAGE/x"], ["a.png"]),
    (convert.main, ["to-hf", "MODEL", "MODEL", "--overwrite"], ["holds what is read"]),
    (convert.main, ["to-hf", "DIR/cut", "DIR/x"], ["model.safetensors"]),
    (convert.main, ["merge-lora", "MODEL", "DIR/empty", "DIR/x"], ["adapter_config.json"]),
    # evaluate
    (evaluate.main, ["--json"], ["--benchmark is missing"]),
    (evaluate.main, ["--benchmark=pretext", *ASKED[:1]], ["--source is missing"]),
    (evaluate.main, ["--benchmark=blonk", *ASKED], ["unknown benchmark 'blonk'"]),
    (evaluate.main, ["--benchmark=blink", *ASKED], ["has no file of BLINK"]),
    (evaluate.main, ["--benchmark=all", *ASKED[:2], "--data=IMAGE"], ["a.png is no folder"]),
    (evaluate.main, ["--benchmark=blink", *ASKED, "--source=scenes"], ["leave out --source"]),
    (evaluate.main, ["--benchmark=blink", *ASKED, "--samples=2"], ["give a --temperature"]),
    (evaluate.main, ["--benchmark=blink", *ASKED, "--max-frames=1"], ["--max-frames"]),
    (evaluate.main, ["--benchmark=blink", *ASKED, "--prompts=0"], ["--prompts"]),
    (evaluate.main, ["--benchmark=blink", *ASKED, "--reasoning", "--own-prompt"], ["two prompts"]),
    (evaluate.main, [*PRETEXT, "--source=scenes", "--paper-prompts"], ["one wording: leave out"]),
    (evaluate.main, [*PRETEXT, "--source=scene"], ["did you mean 'scenes'"]),
    (evaluate.main, [*PRETEXT, "--source=scenes", "--heldout-fraction=1"], ["--heldout-fraction"]),
    (evaluate.main, ["--score=DIR/x.jsonl"], ["x.jsonl cannot be read"]),
    (evaluate.main, ["--score=DIR/x.jsonl", "--model=MODEL"], ["leave it out"]),
    (evaluate.main, ["--score=DIR/x.jsonl", "--compare", "DIR", "DIR"], ["leave one out"]),
    (evaluate.main, ["--score=DIR/x.jsonl", "--data=DIR"], ["--data is for a page's images"]),
    (evaluate.main, ["--compare", "DIR/empty", "DIR"], ["empty has no predictions.jsonl"]),
    # prepare
    (prepare.main, ["coco", "/nowhere", "DIR/x"], ["coco:/nowhere"]),
    (prepare.main, ["coco", "DIR/empty", "DIR/x"], ["found no image"]),
    (prepare.main, ["coco", "DIR/bad", "DIR/x"], ["1 of 1 images", "bad.png"]),
    (prepare.main, ["coco", "IMAGES", "IMAGE/x"], ["a.png"]),
    # bench
    (bench.main, ["rollout", "--model=/nowhere/m"], ["/nowhere/m"]),
    (bench.main, ["rollout", *BENCH, "--runs=0"], ["--runs=0"]),
    (bench.main, ["rollout", *BENCH, "--grid=3"], ["the grid must be even"]),
    (bench.main, ["update", *BENCH, "--prompts=0"], ["--prompts=0"]),
    (bench.main, ["update", *BENCH, "--micro-batch-rows=0"], ["--micro-batch-rows=0"]),
    (bench.main, ["update", *BENCH, "--row-tokens=-1"], ["--row-tokens=-1"]),
    (bench.main, ["step", *BENCH, "--prompt-tokens=1"], ["--prompt-tokens=1"]),
    (bench.main, ["tasks", "--repeats=0"], ["--repeats"]),
    (bench.main, ["tasks", "--repeats=1", "--source=/nowhere"], ["/nowhere"]),
    (bench.main, ["tasks", "--repeats=1", "--source=scenes:9", "--batches=-1"], ["--batches"]),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the names in the cases stand for."""
    folder = tmp_path_factory.mktemp("errors")
    images, files = folder / "images", folder / "dir"
    for name in ("empty", "bad", "damaged"):
        (files / name).mkdir(parents=True)
    (files / "bad" / "bad.png").write_text("no image")
    (files / "damaged" / "config.json").write_text('{"name": "ti')
    (files / "x.array_record-00000-of-00001").write_text("")
    images.mkdir()
    Image.fromarray(np.zeros((56, 56, 3), np.uint8)).save(images / "a.png")
    for name, text in {"broken": "def (", "none": "x = 1", "number": "get_config = int"}.items():
        (files / f"{name}.py").write_text(text + "\n")
    tiny, model = open_model("tiny"), folder / "model"
    export(tiny, random_params(tiny.config, seed=1), model, "bfloat16")
    for name in ("listed", "odd", "wordless", "cut"):
        shutil.copytree(model, files / name)
    (files / "listed" / "config.json").write_text("[]")
    config = json.loads((model / "config.json").read_text())
    (files / "odd" / "config.json").write_text(json.dumps(config | {"vision_config": 3}))
    (files / "wordless" / "tokenizer.json").write_text("{}")
    weights = files / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    return {
        "IMAGES": str(images),
        "IMAGE": str(images / "a.png"),
        "MODEL": str(model),
        "DIR": str(files),
    }


def assert_one_sentence(code: int, err: str, named: Sequence[str]) -> None:
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith((".\n", "?\n")), err
    assert "Traceback" not in err and all(word in err for word in named), err
    assert NEXT.search(err), f"nothing to try next: {err}"


def name_of(case: tuple) -> str:
    main, argv, _ = case
    return f"{main.__module__.rpartition('.')[2]}-{argv[-1] if argv else 'alone'}"


@pytest.mark.parametrize(("main", "argv", "named"), CASES, ids=map(name_of, CASES))
def test_one_sentence_names_the_cause_and_what_to_try(run, places, main, argv, named):
    def placed(word: str) -> str:
        return re.sub("|".join(places), lambda m: places[m[0]], word)

    code, out, err = run(main, *map(placed, argv))
    assert_one_sentence(code, err, named)
    assert out in ("", "opening the model and the images\n")
    left = [p for p in Path(places["DIR"]).iterdir() if p.name in ("w", "p", "x")]
    files = [file for path in left for file in path.rglob("*") if file.is_file()]
    files = [file for file in files if ".config" not in file.parts]  # TFDS notes where it was
    for path in left:
        shutil.rmtree(path)
    assert not files, f"{files} should not be there"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "no", "/data/x"), ["/data/x: No space left", "free space there"]),
        (PermissionError(errno.EACCES, "no", "/data/x"), ["/data/x: Permission denied", "fix"]),
        (FileNotFoundError(errno.ENOENT, "no", "/data/x"), ["/data/x: No such file", "check"]),
        (MemoryError(), ["memory ran out (MemoryError)", "micro_batch_rows"]),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of\n memory"), ["Out of memory)", "--prompts"]),
        (UserError("two\nlines, and no stop: fix it"), ["two lines, and no stop: fix it."]),
    ],
)
def test_an_error_of_the_machine_is_one_sentence(run, error: Exception, words):
    def main(_: Sequence[str]) -> None:
        raise error

    code, out, err = run(main)
    assert_one_sentence(code, err, words)
    code, out, err = run(main, "--debug")
    assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("error: ")


def test_an_error_of_the_program_itself_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    def main(_: Sequence[str]) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(KeyError, match="ours"):
        run_command(main)


@pytest.mark.parametrize(
    ("main", "option", "near"),
    [
        (train.main, "--workdri=x", "unrecognized arguments: --workdri=x"),
        (preview.main, "--sauce=scenes", "the following arguments are required: --out"),
        (convert.main, "to-hff", "invalid choice: 'to-hff' (choose from"),
    ],
)
def test_an_unknown_option_shows_the_usage(run, main, option: str, near: str):
    argv = [TINY, option] if main is train.main else [option]
    code, out, err = run(main, *argv)
    assert (code, out) == (2, "") and err.startswith("usage: python -m spatial_ssrl_jax.")
    assert near in err.splitlines()[-1] and "Traceback" not in err


WAITS = """
import sys, threading, time
from spatial_ssrl_jax.common.errors import run_command
def main(argv):
    threading.Thread(target=time.sleep, args=(60,)).start()
    print("ready", flush=True)
    time.sleep(60)
run_command(main)
"""


INTERRUPTED_IMPORT = """
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name in ("jax", "transformers", "grain"):
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
runpy.run_module("spatial_ssrl_jax." + sys.argv[0][2:], run_name="__main__")
"""
COMMANDS = {
    "train": ["--config=c.py"],
    "plan": ["--config=c.py", "--topology=cpu"],
    "generate": ["--model=m", "--question=Where?"],
    "evaluate": ["--model=m"],
    "preview": ["--source=scenes", "--out=/nowhere/p"],
    "convert": ["to-hf", "/nowhere/a", "/nowhere/b"],
    "bench": ["matmul"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_the_libraries_load_is_one_word(command: str):
    code = f"import sys; sys.argv = ['m/{command}', *sys.argv[1:]]" + INTERRUPTED_IMPORT
    argv = [sys.executable, "-c", code, *COMMANDS[command]]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


LOST = """
import os, signal
from spatial_ssrl_jax.common.errors import run_command
class Garbage:
    def __del__(self):
        def _xla_gc_callback():
            os.kill(os.getpid(), signal.SIGINT)
        _xla_gc_callback()
def main(argv):
    Garbage()
    print("went on")
run_command(main)
"""


def test_ctrl_c_in_a_callback_that_ignores_errors_is_not_lost():
    command = [sys.executable, "-c", LOST]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


@pytest.mark.parametrize("debug", [False, True])
def test_ctrl_c_ends_at_once_without_a_traceback(debug: bool):
    child = subprocess.Popen(
        [sys.executable, "-c", WAITS, *(["--debug"] * debug)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert child.stdout.readline() == "ready\n"
    os.kill(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=10)
    assert child.returncode == 130 and err.endswith("stopped\n")
    assert ("Traceback" in err) == debug

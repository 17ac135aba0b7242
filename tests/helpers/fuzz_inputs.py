"""The inputs that are fuzzed: each writes a good one, and reads it as the commands do."""

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from random import Random

import av
import jax
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, features

from spatial_ssrl_jax import evaluate, prepare
from spatial_ssrl_jax.checkpoint.export import copy_files
from spatial_ssrl_jax.checkpoint.manager import MODEL, Checkpoints, set_aside_damaged
from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.config.load import load_config, split_overrides, to_dict
from spatial_ssrl_jax.config.schema import Config, MeshSettings
from spatial_ssrl_jax.data.images import open_image, reads_heif
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.data.sources import QuestionSource, open_source
from spatial_ssrl_jax.data.sources.parquet import write_questions
from spatial_ssrl_jax.data.split import split_records
from spatial_ssrl_jax.data.videos import Video, measure_video, open_video, stills
from spatial_ssrl_jax.eval.benchmarks.registry import Benchmark, open_benchmark
from spatial_ssrl_jax.eval.prediction_log import PredictionLog
from spatial_ssrl_jax.eval.predictions import as_line
from spatial_ssrl_jax.eval.questions import Prediction, unscored_prediction
from spatial_ssrl_jax.monitoring.metrics import MetricsWriter
from spatial_ssrl_jax.monitoring.rollout_samples import write_rollouts
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.family import config_to_dict
from spatial_ssrl_jax.qwen_vl.lora import LoraSettings, select_adapters
from spatial_ssrl_jax.qwen_vl.model import init_adapters
from spatial_ssrl_jax.qwen_vl.peft import read_adapter, write_adapter
from spatial_ssrl_jax.qwen_vl.weights import entries, write_params
from spatial_ssrl_jax.rl.train_step import initial_train_state
from spatial_ssrl_jax.trainer.context import RunState
from spatial_ssrl_jax.trainer.report import write_report
from spatial_ssrl_jax.trainer.run_inputs import RunInputs
from spatial_ssrl_jax.trainer.workdir import check_workdir, claim_workdir
from tests.conftest import SMALL_TEXT, SMALL_VISION, random_params
from tests.helpers import benchmark_files, corruptions, rgbd_files, tool_answers
from tests.helpers.corruptions import Corrupt
from tests.helpers.images import photo, room

QUESTION, ANSWER = "Where is it?", r"<think>There.</think> \\boxed{A}"


@dataclasses.dataclass(frozen=True)
class Input:
    """One kind of input.

    Attributes:
      name: in the table.
      write: writes a good one, with what is read beside it, into an empty folder.
      files: pattern of the files in it that are damaged, one at a time.
      read: reads the folder as the commands do.
      corrupt: damages a file's content.
      is_file: whether something else may be in the file's place.
    """

    name: str
    write: Callable[[Path], object]
    files: str
    read: Callable[[Path], object]
    corrupt: Corrupt
    is_file: bool = True


# Models -------------------------------------------------------------------------------------------


@cache
def toy_config():
    tiny = open_model("tiny")
    return dataclasses.replace(
        tiny.config,
        text=dataclasses.replace(tiny.config.text, **SMALL_TEXT),
        vision=dataclasses.replace(tiny.config.vision, **SMALL_VISION),
    )


@cache
def toy_params():
    return random_params(toy_config(), seed=1)


def write_model(folder: Path, shard_bytes: int = 4 << 30) -> None:
    copy_files(open_model("tiny"), folder)
    config = config_to_dict(toy_config(), "float32")
    (folder / "config.json").write_text(json.dumps(config))
    write_params(folder, toy_config(), toy_params(), "float32", shard_bytes)


def write_newer_model(folder: Path) -> None:
    """As Transformers 5 writes it: one processor file, tokenizer.json, a template of its own."""
    write_model(folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    both = {"image_processor": settings, "video_processor": settings}
    (folder / "processor_config.json").write_text(json.dumps(both))
    Processor(folder, toy_config()).tokenizer.save_pretrained(folder)
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    (folder / "chat_template.jinja").write_text(template)
    for name in ("preprocessor_config.json", "chat_template.json", "vocab.json", "merges.txt"):
        (folder / name).unlink()


def write_video_settings(folder: Path) -> None:
    write_model(folder)
    settings = (folder / "preprocessor_config.json").read_text()
    (folder / "video_preprocessor_config.json").write_text(settings)


def use_model(folder: Path) -> None:
    """All that `generate` does before its programs are compiled."""
    model = open_model(folder)
    processor = Processor(model.files, model.config)
    image = photo(0, 60, 60)
    processor.prompt(f"<image>{QUESTION}<video>", [image], [Video(np.stack([image] * 3), 2.0)])
    processor.decode(processor.encode_response(ANSWER))
    model.check_weights()
    model.fingerprint()


def load_model(folder: Path) -> None:
    use_model(folder)
    open_model(folder).load(Layout(make_mesh(MeshSettings())))


def read_form(folder: Path) -> None:
    """A config of full size, without weights: the tensors that it asks for."""
    entries(open_model(folder).config)


def form_writer(config: Path) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        copy_files(open_model("tiny"), folder)
        shutil.copyfile(config, folder / "config.json")

    return write


TEMPLATES = (
    "{{", "{% for %}", "{{ messages[0].x.y }}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}",
    "{% if x %}", "{{ messages | nothing }}", "{% include 'a' %}", "{{ ''.__class__.__mro__ }}",
    "{{ 'x' * 10**7 }}", "{% for i in range(10**9) %}x{% endfor %}", "{{ messages[7] }}",
    "", "{{ 7 }}", "{{ undefined() }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ '\ud800' }}", "{% import 'os' %}", "{% set messages = 3 %}{{ messages.a.b }}",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}", "{{ lipsum(3) }}", "<|image_pad|>" * 3,
)  # fmt: skip


def template(rng: Random, content: bytes) -> corruptions.Corruption:
    if rng.random() < 0.4:
        return corruptions.text(rng, content)
    chosen = rng.choice(TEMPLATES)
    return f"template {chosen[:40]}", chosen.encode("utf-8", "surrogatepass")


def template_json(rng: Random, content: bytes) -> corruptions.Corruption:
    if rng.random() < 0.5:
        return corruptions.json_file(rng, content)
    chosen = rng.choice(TEMPLATES)
    return f"template {chosen[:40]}", json.dumps({"chat_template": chosen}).encode()


def write_lora(folder: Path) -> None:
    adapters = init_adapters(toy_config(), LoraSettings(2), jax.random.key(0))
    write_adapter(folder, toy_config(), select_adapters(adapters), "some/base")


def read_lora(folder: Path) -> None:
    read_adapter(folder, toy_config())


def model_inputs() -> Iterator[Input]:
    json_file, text = corruptions.json_file, corruptions.text
    shards = lambda folder: write_model(folder, shard_bytes=200_000)  # noqa: E731
    for name in ("config", "preprocessor_config", "generation_config", "tokenizer_config", "vocab"):
        yield Input(f"{name}.json", write_model, f"{name}.json", use_model, json_file)
    yield Input("merges.txt", write_model, "merges.txt", use_model, text)
    yield Input("chat_template.json", write_model, "chat*.json", use_model, template_json)
    yield Input("video_preprocessor", write_video_settings, "video_pre*.json", use_model, json_file)
    for file in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        name = f"{file} (Transformers 5)"
        yield Input(name, write_newer_model, file, use_model, json_file)
    yield Input("chat_template.jinja", write_newer_model, "*.jinja", use_model, template)
    yield Input("index.json", shards, "*.index.json", load_model, json_file)
    yield Input("safetensors", write_model, "*.safetensors", load_model, corruptions.safetensors)
    yield Input("shards", shards, "*.safetensors", load_model, corruptions.safetensors)
    yield Input("adapter_config.json", write_lora, "adapter_config.json", read_lora, json_file)
    yield Input("adapter", write_lora, "*.safetensors", read_lora, corruptions.safetensors)
    forms = Path(__file__).parents[3] / "shared" / "field" / "model_configs"
    for path in sorted(forms.glob("*/config.json")):  # none where the folder is missing
        yield Input(path.parent.name, form_writer(path), "config.json", read_form, json_file)


# Images, depth, videos, questions -----------------------------------------------------------------


OTHER_IMAGES = tuple(
    file
    for file, is_read in (("a.avif", features.check("avif")), ("a.heic", reads_heif()))
    if is_read
)
IMAGES = ("a.jpg", "a.png", "palette.png", "grey.png", "a.webp", "a.gif", "a.bmp", "a.tif")


def write_images(folder: Path) -> None:
    image = Image.fromarray(photo(0, 60, 80))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "a.jpg", exif=exif)
    image.save(folder / "a.png")
    image.convert("P").save(folder / "palette.png")
    Image.fromarray((room(0, 60, 80) * 1000).astype(np.uint16)).save(folder / "grey.png")
    image.save(folder / "a.webp")
    image.save(folder / "a.bmp")
    image.save(folder / "a.gif", save_all=True, append_images=[image.rotate(90)])
    image.save(folder / "a.tif", compression="tiff_lzw")
    for file in OTHER_IMAGES:
        image.save(folder / file)


def read_images(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        open_image(path)
    read_source(f"folder:{folder}")


def read_source(spec: str) -> None:
    """A source's first record and its split, as a run reads them."""
    source = open_source(spec)
    source.fingerprint()
    split_records(source, 0.01)
    for index in range(min(len(source), 4)):
        source.name(index)
        if isinstance(source, QuestionSource):
            source.sizes(index)
            example = source[index]
            tiny_processor().prompt(example.question, example.images)
            tiny_processor().encode_response(example.response)
        else:
            source.size(index)
            source[index]


@cache
def tiny_processor() -> Processor:
    model = open_model("tiny")
    return Processor(model.files, model.config, 28 * 28, 56 * 56)


def write_rgbd(folder: Path) -> None:
    import h5py

    depth = room(0, 60, 80)
    for name in "abc":
        Image.fromarray(photo(0, 60, 80)).save(folder / f"{name}.png")
    Image.fromarray((depth * 1000).astype(np.uint16)).save(folder / "a_depth.png")
    np.save(folder / "b_depth.npy", depth)
    np.save(folder / "b_depth_mask.npy", depth > 0)
    with h5py.File(folder / "c_depth.h5", "w") as file:
        file["depth"] = depth


def read_rgbd(folder: Path) -> None:
    read_source(f"rgbd:{folder}")


def write_video(folder: Path) -> None:
    with av.open(folder / "a.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.height, stream.width, stream.pix_fmt = 64, 80, "yuv420p"
        frames = [av.VideoFrame.from_ndarray(photo(i, 64, 80), format="rgb24") for i in range(8)]
        for frame in (*frames, None):
            container.mux(stream.encode(frame))
    (folder / "beside.txt").write_text("")


def read_video(folder: Path) -> None:
    measure_video(folder / "a.mp4")
    open_video(folder / "a.mp4")
    stills(folder / "a.mp4", 3)


def sft_rows() -> list[dict]:
    question = "<image>\nThe image is flipped. Which way?"
    row = {"instruction": question, "input": "", "output": ANSWER, "images": ["images/a.png"]}
    return [row, row | {"images": ["images/b.png"]}]


def write_sft(folder: Path) -> None:
    (folder / "images").mkdir()
    for name in "ab":
        Image.fromarray(photo(1, 60, 80)).save(folder / "images" / f"{name}.png")
    (folder / "sft.json").write_text(json.dumps(sft_rows()))


def write_parquet(folder: Path) -> None:
    row = {"problem": "<image>The image is flipped. Which way?", "answer": "A"}
    image = {"bytes": benchmark_files.png(1), "path": "a.png"}
    write_questions(folder / "train.parquet", [row | {"images": [image]}] * 3)


def write_parquet_paths(folder: Path) -> None:
    write_sft(folder)
    (folder / "sft.json").unlink()
    row = {"problem": "<image>The image is flipped. Which way?", "answer": "A"}
    rows = [row | {"images": [f"images/{name}.png"]} for name in "ab"]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")


def write_packed(folder: Path) -> None:
    source = folder.parent / "packed"
    source.mkdir()
    write_rgbd(source)
    with contextlib.redirect_stdout(io.StringIO()):
        prepare.main(["rgbd", str(source), str(folder)])


PACKED = "ssrl_pictures/rgbd/1.0.0"


def read_packed(folder: Path) -> None:
    read_source(f"tfds:ssrl_pictures/rgbd@{folder}")
    read_source(f"arrayrecord:{folder}/{PACKED}/*.array_record*")


def data_inputs() -> Iterator[Input]:
    def questions(folder: Path) -> None:
        read_source(f"ssrl81k:{folder}")

    for file in (*IMAGES, *OTHER_IMAGES):
        yield Input(f"image {file}", write_images, file, read_images, corruptions.binary)
    yield Input("depth png", write_rgbd, "a_depth.png", read_rgbd, corruptions.binary)
    yield Input("depth npy", write_rgbd, "b_depth*.npy", read_rgbd, corruptions.npy)
    yield Input("depth h5", write_rgbd, "c_depth.h5", read_rgbd, corruptions.hdf5)
    for file in ("a_depth.pfm", "b_depth.tif", "c_depth.npz", "d_depth_mask.png"):
        yield Input(file, rgbd_files.write_depths, file, read_rgbd, corruptions.binary)
    if rgbd_files.HAS_EXR:
        yield Input("a_depth.exr", rgbd_files.write_exr, "*.exr", read_rgbd, corruptions.binary)
    yield Input("TUM depth", rgbd_files.write_tum, "depth/*", read_rgbd, corruptions.binary)
    yield Input("associations", rgbd_files.write_tum, "*.txt", read_rgbd, corruptions.text)
    yield Input("labeled .mat", rgbd_files.write_labeled, "*.mat", read_rgbd, corruptions.binary)
    yield Input("frame .h5", rgbd_files.write_frames, "1.h5", read_rgbd, corruptions.hdf5)
    yield Input("video", write_video, "a.mp4", read_video, corruptions.binary)
    yield Input("SFT JSON", write_sft, "sft.json", questions, corruptions.json_file)
    yield Input("SFT image", write_sft, "images/*.png", questions, corruptions.binary)
    yield Input("RL parquet", write_parquet, "*.parquet", questions, corruptions.parquet)
    yield Input("RL parquet, paths", write_parquet_paths, "*.parquet", questions,
                corruptions.parquet)  # fmt: skip
    yield Input("packed JSON", write_packed, f"{PACKED}/*.json", read_packed,
                corruptions.json_file)  # fmt: skip
    yield Input("packed records", write_packed, f"{PACKED}/*record*", read_packed,
                corruptions.binary)  # fmt: skip


# Benchmarks and predictions -----------------------------------------------------------------------


def read_benchmark(name: str, folder: Path) -> None:
    """Opens the questions, makes their prompts and measures their images, and scores answers."""
    for allow_missing in (True, False):
        opened = open_benchmark(name, folder, allow_missing)
    for question in opened.questions[:3]:
        for style in ("direct", "reasoning"):
            prompt = opened.prompt(question, style)
            tiny_processor().chat(prompt.text, len(prompt.images), int(prompt.video is not None))
        for image in prompt.images:
            image.size()
            image.open()
    with contextlib.suppress(ValueError):  # without a public answer
        opened.score(answers(opened))


def answers(opened: Benchmark) -> list[Prediction]:
    return [
        unscored_prediction(q, opened.prompt(q, "direct"), rf"\boxed{{{q.target}}}")
        for q in opened.questions
    ]


def write_predictions(name: str, folder: Path) -> None:
    """Answers to a benchmark, in two samples each where it is the pretext tasks."""
    if name == "pretext":
        meta = {"task": "flip", "kind": "flip", "source": {"spec": "x", "record": "a.png"}}
        meta |= {"truth": {"a": 1}, "chance": 0.25}
        found = [
            Prediction("flip-0", name, "flip", QUESTION, "A", ANSWER, meta | {"sample": n})
            for n in (1, 2)
        ]
    else:
        data = folder / "data"
        data.mkdir()
        benchmark_files.WRITERS[name](data)
        found = answers(open_benchmark(name, data))
    text = "".join(map(as_line, found))
    (folder / "a.jsonl").write_text(text)
    (folder / "b.jsonl").write_text(text)
    (folder / "out").mkdir()


def read_predictions(folder: Path) -> None:
    evaluate.main(["--score", f"{folder}/a.jsonl", f"--out={folder}/out"])
    evaluate.main(["--compare", f"{folder}/a.jsonl", f"{folder}/b.jsonl", f"--out={folder}/out"])


def write_tool_answers(file: str, folder: Path) -> None:
    """Answers of VLMEvalKit, or of lmms-eval, to the questions beside them."""
    table = benchmark_files.write_vsi_tsv(folder)
    if not file.endswith(".jsonl"):
        tool_answers.write_kit_table(folder / file, table, ["4", "B. right"])
        return
    docs = map(json.loads, benchmark_files.write_vsi_hub(folder).read_text().splitlines())
    rows = [
        {"doc_id": i, "input": "", "resps": [["4"]], "score": doc} for i, doc in enumerate(docs)
    ]
    (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_tool_answers(file: str, folder: Path) -> None:
    for data in ([f"--data={folder}/vsi_bench.json"], []):
        evaluate.main(["--score", f"{folder}/{file}", "--allow-missing", *data])


ABOUT = {"model": "tiny", "benchmark": "blink", "style": "direct"}


def write_log(folder: Path) -> None:
    data = folder / "data"
    data.mkdir()
    benchmark_files.WRITERS["blink"](data)
    PredictionLog(folder / "out", ABOUT).add(answers(open_benchmark("blink", data))[:2])


def read_log(folder: Path) -> None:
    opened = open_benchmark("blink", folder / "data")
    log = PredictionLog(folder / "out", ABOUT)
    prompts = [opened.prompt(question, "direct") for question in opened.questions]
    log.answered(opened.questions, prompts, 1)


FORMATS = {
    "TSV": ("spatial457", "3dsrbench", "mmbench", "blink", "realworldqa", "chartqa"),
    "JSON": ("whatsup", "viewspatial", "vsi_bench", "hallusionbench", "ocrbench"),
    "parquet": ("qspatial_plus",),
}
DAMAGE = {
    "TSV": corruptions.table_text,
    "JSON": corruptions.json_file,
    "parquet": corruptions.parquet,
}


def eval_inputs() -> Iterator[Input]:
    for kind, names in FORMATS.items():
        for name in names:
            yield Input(
                f"{kind} {name}",
                benchmark_files.WRITERS[name],
                f"*.{kind.lower()}",
                lambda folder, name=name: read_benchmark(name, folder),
                DAMAGE[kind],
            )
    for name in ("pretext", *benchmark_files.WRITERS):
        yield Input(
            f"predictions {name}",
            lambda folder, name=name: write_predictions(name, folder),
            "a.jsonl",
            read_predictions,
            corruptions.json_lines,
        )
    for file, damage in (
        ("M_VSI-Bench.xlsx", corruptions.binary),
        ("M_VSI-Bench.tsv", corruptions.table_text),
        ("M_VSI-Bench.json", corruptions.json_file),
        ("1_samples_vsibench.jsonl", corruptions.json_lines),
    ):
        write = partial(write_tool_answers, file)
        yield Input(file, write, file, partial(read_tool_answers, file), damage)
    yield Input("asked.json", write_log, "out/asked.json", read_log, corruptions.json_file)
    yield Input("predictions to resume", write_log, "out/*.jsonl", read_log,
                corruptions.json_lines)  # fmt: skip


# A run's folder -----------------------------------------------------------------------------------

RUN = Config("fuzzed")
INPUTS = RunInputs([], {"model.path": "1", "data.source": "2"})


def train_state():
    return initial_train_state(optax.sgd(1e-3), toy_params())


def write_run(folder: Path) -> None:
    workdir = folder / "run"
    claim_workdir(RUN, workdir, False, INPUTS)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=2)
    state = RunState(heldout={"sft": {"flip": {"format": 1.0}}}, seconds={"sft": 1.5})
    for step in (1, 2):
        checkpoints.save(step, "sft", train_state(), state.as_meta())
    checkpoints.wait()
    checkpoints.close()
    write_model(make(workdir / "checkpoints" / MODEL))
    for file in (workdir / "checkpoints" / MODEL).glob("*.safetensors"):
        file.unlink()
    metrics = MetricsWriter(workdir)
    for step in (1, 2):
        values = {"reward/overall_mean": 0.5, "perf/step_seconds": 1.0, "kl/mean": 0.1}
        metrics.write("grpo", step, values | {"heldout/flip/format": 1.0})
    metrics.close()
    response = {"text": ANSWER, "reward": 1.0, "accuracy": 1.0, "format": 1.0, "advantage": 0.5}
    response |= {"length": 7, "finished": True}
    row = {"task": "flip", "kind": "flip", "question": QUESTION, "answer": "A", "source": {}}
    write_rollouts(workdir, 1, [row | {"images": [photo(0, 30, 40)], "responses": [response]}] * 2)


def make(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def resume(folder: Path) -> None:
    """What `train` reads of its own folder."""
    workdir = folder / "run"
    check_workdir(RUN, workdir, False, INPUTS)
    set_aside_damaged(workdir / "checkpoints", lambda text: None)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=2)
    try:
        step = checkpoints.latest() or 0
        if step:
            RunState().restore(checkpoints.read_meta(step))
            checkpoints.restore(step, train_state())
            model = open_model(workdir / "checkpoints" / str(step))
            model.check_weights()
            Processor(model.files, model.config)
    finally:
        checkpoints.close()
    MetricsWriter(workdir, step).close()
    write_report(workdir, to_dict(RUN), "fuzzed")


def without_checksums(folder: Path) -> None:
    """A checkpoint whose damage its checksums do not show, as it has none."""
    write_run(folder)
    for file in folder.glob("run/checkpoints/*/checksums.json"):
        file.unlink()


def run_inputs() -> Iterator[Input]:
    json_file, lines = corruptions.json_file, corruptions.json_lines
    for name in ("config.json", "inputs.json"):
        yield Input(f"run's {name}", write_run, f"run/{name}", resume, json_file)
    yield Input("metrics.jsonl", write_run, "run/metrics.jsonl", resume, lines)
    yield Input("rollouts", write_run, "run/rollouts/*.jsonl", resume, lines)
    yield Input("rollout images", write_run, "run/rollouts/images/*.png", resume,
                corruptions.binary)  # fmt: skip
    steps = "run/checkpoints/[12]"
    yield Input("checksums.json", write_run, f"{steps}/checksums.json", resume, json_file)
    yield Input("checkpoint's model", write_run, "run/checkpoints/model/*.json", resume, json_file)
    yield Input("checkpoint JSON", without_checksums, f"{steps}/**/*META*", resume, json_file)
    yield Input("checkpoint's meta", without_checksums, f"{steps}/meta/metadata", resume, json_file)
    yield Input("checkpoint files", write_run, f"{steps}/**/*", resume, corruptions.binary)
    yield Input("checkpoint arrays", without_checksums, f"{steps}/**/d/*", resume,
                corruptions.binary)  # fmt: skip


# Settings -----------------------------------------------------------------------------------------

GOOD = "from spatial_ssrl_jax.config import Config\n\n\ndef get_config():\n    return Config('x')\n"
_CONFIG = "from spatial_ssrl_jax.config import Config\ndef get_config(): return "
SCRIPTS = (
    "def get_config(:", "1 / 0", "x = 1", "def get_config(): return 3", "import nothing",
    "def get_config(a): return a", "def get_config(): raise KeyError('a')", "get_config = 3",
    "def get_config(): return get_config()", "raise SystemExit(3)", "exit()", "quit(1)",
    "def get_config(): return None", "import sys; sys.argv = None", "assert False",
    "raise Exception", "raise ValueError('a\\nb')", "def get_config(): return type('C', (), {})()",
    "\tx = 1", "((((" * 500, "class A(A): pass", f"{_CONFIG}Config", f"{_CONFIG}Config(3)",
    f"{_CONFIG}Config('x', seed='a')", f"{_CONFIG}Config('x', model=None)",
    f"{_CONFIG}Config('x', grpo=3)", f"{_CONFIG}Config('x', tasks=[])",
    f"{_CONFIG}Config('x', y=3)", f"{_CONFIG}Config('x', tasks={{1: 2}})",
)  # fmt: skip


def script(rng: Random, content: bytes) -> corruptions.Corruption:
    if rng.random() < 0.3:
        return corruptions.text(rng, content)
    chosen = rng.choice(SCRIPTS)
    return f"script {chosen[:50]!r}", chosen.encode()


SETTINGS = (
    "seed", "grpo.steps", "grpo.learning_rate", "data.prompt_buckets", "sft.freeze", "model.dtype",
    "tasks.flip.weight", "tasks.shuffle.kinds", "tasks.shuffle.kinds.3x1", "grpo", "", ".", "a.b.c",
    "grpo.lora.rank", "mesh.fsdp", "data.source", "grpo.scale_rewards", "eval.benchmark_data",
    "reward", "name", "grpo..steps", "sft.row_patches", "grpo.lora.targets", "__class__", "tasks",
)  # fmt: skip
SETTING_VALUES = (
    "", " ", "x", "-1", "1e400", "nan", "1" * 5000, "None", "True", "[]", "()", "{}", "(1,", "1+1",
    "'a'", "(((" * 300, "[" * 5000, "b'a'", "\0", "\ud800", "1.5", "(1, 'a')", "...", "lambda: 0",
    "(" * 90 + ")" * 90, "-" * 100_000 + "1", "10**9", "0x10", "1j", "{1}", "(1.5,)", "(None,)",
)  # fmt: skip


def setting(rng: Random, content: bytes) -> corruptions.Corruption:
    word = f"--config.{rng.choice(SETTINGS)}={rng.choice(SETTING_VALUES)}"
    return word[:60], word.encode("utf-8", "surrogatepass")


def write_script(folder: Path) -> None:
    (folder / "config.py").write_text(GOOD)
    (folder / "setting").write_text("--config.seed=3")


def read_script(folder: Path) -> None:
    load_config(str(folder / "config.py"))


def read_setting(folder: Path) -> None:
    word = (folder / "setting").read_bytes().decode("utf-8", "surrogatepass")
    load_config(str(folder / "config.py"), split_overrides([word])[1])


def setting_inputs() -> Iterator[Input]:
    yield Input("config file", write_script, "config.py", read_script, script)
    yield Input("--config.a.b=v", write_script, "setting", read_setting, setting, is_file=False)


def every_input() -> list[Input]:
    return [*model_inputs(), *data_inputs(), *eval_inputs(), *run_inputs(), *setting_inputs()]

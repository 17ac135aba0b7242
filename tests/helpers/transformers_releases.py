"""Exchanges models with releases of Transformers, both ways; by hand: needs torch and a network.

    python -m tests.helpers.transformers_releases FOLDER 4.49.0 4.57.3 5.4.0

Each release is installed below FOLDER, beside what is installed here. It saves a small random model
with the real tokenizer (from `../shared`), with a tied head in one file and with an untied one in
shards, and answers a question about a picture, greedily and in float32. `generate` then has to give
the same prompt and the same tokens; and the release has to load what `convert to-hf` makes of the
model, and an export of the tiny model, without a missing or unexpected tensor, and to give the
tokens of `generate`.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
PICTURE = SHARED / "photos" / "eg1.jpg"
QUESTION = "What is in this picture?"
NEW_TOKENS = 32
FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.json")
TEXT = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_window_layers=2,
    rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
)
VISION = dict(
    depth=4,
    hidden_size=64,
    intermediate_size=96,
    num_heads=2,
    out_hidden_size=64,
    fullatt_block_indexes=[3],
)


# In the release: no module of this package, whose own Transformers is another one.


def make(folder: Path, tied: bool) -> None:
    """Saves model and processor of a few million random weights, as this release saves them."""
    import torch
    import transformers

    (folder / "start").mkdir(parents=True)
    raw = json.loads((SHARED / "qwen2_5_vl" / "3b" / "config.json").read_text())
    raw |= TEXT | dict(tie_word_embeddings=tied, torch_dtype="float32")
    raw["vision_config"] |= VISION
    settings = json.loads((SHARED / "qwen2_5_vl" / "preprocessor_config.json").read_text())
    settings["max_pixels"] = 224 * 224
    for name, value in (("config.json", raw), ("preprocessor_config.json", settings)):
        (folder / "start" / name).write_text(json.dumps(value))
    for name in FILES:
        (folder / "start" / name).write_bytes((SHARED / "qwen2_5_vl" / name).read_bytes())
    torch.manual_seed(0)
    config = transformers.Qwen2_5_VLConfig.from_pretrained(folder / "start")
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():  # else every greedy token is the same
            weight.mul_(5 if weight.ndim > 1 and "embed_tokens" not in name else 1)
    model.save_pretrained(folder / "model", max_shard_size="5GB" if tied else "8MB")
    for part in processors(folder / "start"):
        part.save_pretrained(folder / "model")


def processors(folder: Path) -> list[Any]:
    """The processor; where it needs torchvision, tokenizer and image processor apart."""
    import transformers

    try:
        return [transformers.AutoProcessor.from_pretrained(folder, use_fast=False)]
    except (ImportError, ValueError):
        pass
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        template = json.loads((folder / "chat_template.json").read_text())
        tokenizer.chat_template = template["chat_template"]
    return [tokenizer, image_processor(folder)]


def image_processor(folder: Path) -> Any:
    """The image processor that works on PIL images."""
    import transformers

    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil as Processor,
        )
    except ImportError:
        Processor = transformers.Qwen2VLImageProcessor
    return Processor.from_pretrained(folder)


def inputs_of(folder: Path) -> tuple[dict[str, Any], str]:
    """The model's inputs, and what made them."""
    import transformers
    from PIL import Image

    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    image = Image.open(PICTURE).convert("RGB")
    parts = processors(folder)
    text = parts[0].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if len(parts) == 1:
        return dict(parts[0](text=[text], images=[image], return_tensors="pt")), "processor"
    tokenizer, images = parts
    found = dict(images(images=[image], return_tensors="pt"))
    count = int(found["image_grid_thw"].prod()) // 4
    text = text.replace("<|image_pad|>", "<|image_pad|>" * count)
    found |= dict(tokenizer([text], return_tensors="pt"))
    if transformers.__version__ >= "5":
        image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        found["mm_token_type_ids"] = (found["input_ids"] == image_id).int()
    return found, "tokenizer and image processor"


def answer(folder: Path) -> dict[str, Any]:
    """Loads a folder; gives what does not fit, the prompt, greedy tokens and log-probabilities."""
    import torch
    import transformers

    torch.set_num_threads(1)
    kind = "AutoModelForImageTextToText"
    auto = getattr(transformers, kind, None) or transformers.AutoModelForVision2Seq
    model, info = auto.from_pretrained(folder, torch_dtype=torch.float32, output_loading_info=True)
    inputs, by = inputs_of(folder)
    raw = json.loads((folder / "config.json").read_text())
    never = [raw[f"{name}_token_id"] for name in ("image", "video", "vision_start", "vision_end")]
    with torch.no_grad():
        found = model.eval().generate(
            **inputs,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            repetition_penalty=1.0,
            suppress_tokens=never,  # as here
            output_logits=True,
            return_dict_in_generate=True,
        )
    prompt = inputs["input_ids"][0].tolist()
    tokens = found.sequences[0, len(prompt) :].tolist()
    scores = [x[0].log_softmax(-1)[t].item() for x, t in zip(found.logits, tokens, strict=True)]
    wrong = {key: sorted(map(str, names)) for key, names in info.items() if names}
    return dict(wrong=wrong, prompt=prompt, tokens=tokens, scores=scores, by=by)


# Here.


def install(folder: Path, version: str) -> None:
    """A release with the tokenizers and the hub's client that it asks for."""
    if folder.is_dir():
        return
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder)]
    subprocess.run([*pip, "--no-deps", f"transformers=={version}"], check=True)
    (release,) = distributions(name="transformers", path=[str(folder)])
    wanted = [r for r in release.requires or [] if ";" not in r]
    beside = [r for r in wanted if r.startswith(("tokenizers", "huggingface-hub"))]
    subprocess.run([*pip, *beside], check=True)


def call(release: Path, folder: Path, *argv: str) -> Any:
    """Runs this file with a release; its last line is JSON."""
    path = {"PYTHONPATH": str(release), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, __file__, "--in-release", str(folder), *argv]
    done = subprocess.run(words, env=os.environ | path, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def ours(folder: Path) -> dict[str, Any]:
    """What `generate` gives."""
    words = [sys.executable, "-m", "spatial_ssrl_jax.generate", f"--model={folder}", "--json"]
    words += [f"--image={PICTURE}", f"--question={QUESTION}", f"--max-new-tokens={NEW_TOKENS}"]
    done = subprocess.run([*words, "--dtype=float32"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found = json.loads(done.stdout)
    (sample,) = found["samples"]
    return dict(prompt=found["prompt_ids"], tokens=sample["ids"], scores=sample["logprobs"])


def export_tiny(folder: Path) -> None:
    """The tiny model with random weights."""
    from spatial_ssrl_jax.checkpoint.export import export
    from spatial_ssrl_jax.checkpoint.models import open_model
    from tests.conftest import random_params

    tiny = open_model("tiny")
    export(tiny, random_params(tiny.config, seed=3), folder, "float32", overwrite=True)


def compare(theirs: dict[str, Any], mine: dict[str, Any]) -> str:
    """`equal` with the largest difference of log-probabilities, or what is not."""
    if theirs["wrong"]:
        return f"loading: {theirs['wrong']}"
    if theirs["prompt"] != mine["prompt"]:
        return "another prompt"
    if theirs["tokens"] != mine["tokens"]:
        return f"other tokens: {theirs['tokens']} and here {mine['tokens']}"
    error = max(abs(a - b) for a, b in zip(theirs["scores"], mine["scores"], strict=True))
    distinct = len(set(mine["tokens"]))
    return f"equal ({len(mine['tokens'])} tokens, {distinct} distinct, {error:.0e}; {theirs['by']})"


def check(work: Path, version: str, tiny: Path) -> None:
    """Prints a line for each exchange with one release."""
    release = work / f"transformers-{version}"
    install(release, version)
    for tied in (True, False):
        folder = work / f"made-by-{version}-{'tied' if tied else 'untied'}"
        head = "tied" if tied else "untied, sharded"
        if not folder.is_dir():
            call(release, folder, "make", str(int(tied)))
        mine = ours(folder / "model")
        theirs = call(release, folder / "model", "answer")
        print(f"| {version} | theirs, {head} | {compare(theirs, mine)} |", flush=True)
        words = ["to-hf", str(folder / "model"), str(folder / "ours"), "--overwrite"]
        subprocess.run(
            [sys.executable, "-m", "spatial_ssrl_jax.convert", *words],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        theirs = call(release, folder / "ours", "answer")
        print(f"| {version} | ours, {head} | {compare(theirs, mine)} |", flush=True)
    print(f"| {version} | ours, tiny | {compare(call(release, tiny, 'answer'), ours(tiny))} |")


def main(argv: list[str]) -> None:
    if argv[0] == "--in-release":
        folder, what, *more = argv[1:]
        result = make(Path(folder), bool(int(more[0]))) if what == "make" else answer(Path(folder))
        print(json.dumps(result))
        return
    work, tiny = Path(argv[0]), Path(argv[0]) / "tiny"
    work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(work / "jax-cache"))
    export_tiny(tiny)
    for version in argv[1:]:
        check(work, version, tiny)


if __name__ == "__main__":
    main(sys.argv[1:])

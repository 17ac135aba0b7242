"""One step on several meshes: `python -m tests.helpers.equality` prints the differences.

An SFT step and a GRPO step of the toy model with random weights, from data to new weights.
"""

import argparse
import dataclasses
import pickle
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax.checkpoint.export import export
from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.monitoring.progress import Progress
from spatial_ssrl_jax.parallel.collectives import all_gather, gather_to_host, is_primary
from spatial_ssrl_jax.parallel.distributed import add_options, connect
from spatial_ssrl_jax.rl import scorer
from spatial_ssrl_jax.rl.bucketing import Buckets
from spatial_ssrl_jax.rl.grpo import Grpo
from spatial_ssrl_jax.rl.rewards import Reward
from spatial_ssrl_jax.rl.row_shapes import row_shapes
from spatial_ssrl_jax.rl.sft import encode_responses, pack_step
from spatial_ssrl_jax.rl.stages import GrpoStage, SftStage, stages
from spatial_ssrl_jax.rl.step_metrics import prompt_rows
from spatial_ssrl_jax.rl.train_step import add_gradients, gradient_shardings, micro_gradients
from spatial_ssrl_jax.trainer.context import Run, open_run, pipeline
from spatial_ssrl_jax.trainer.initial_state import StageInitializer
from spatial_ssrl_jax.trainer.preemption import Preemption
from tests.conftest import SMALL_TEXT, SMALL_VISION, random_params
from tests.helpers.processes import start_all
from tests.helpers.toy_runs import ROWS, make_config

Arrays = dict[str, np.ndarray]

# name -> processes, devices of each, and the mesh over all of them; the first is the
# reference.
LAYOUTS: dict[str, tuple[int, int, dict[str, int]]] = {
    "1 device": (1, 1, {}),
    "fsdp=8": (1, 8, {"fsdp": 8}),
    "data=2 x fsdp=2 x tensor=2": (1, 8, {"data": 2, "fsdp": 2, "tensor": 2}),
    "tensor=4": (1, 4, {"fsdp": 1, "tensor": 4}),
    "2 processes x 4, fsdp=8": (2, 4, {"fsdp": 8}),
    "2 processes x 4, data=2 x fsdp=2 x tensor=2": (2, 4, {"data": 2, "fsdp": 2, "tensor": 2}),
}


def equality_config(folder: Path) -> c.Config:
    """Both stages of a toy, written to disk; its heads divide by four, but for two key heads."""
    tiny = open_model("tiny")
    config = dataclasses.replace(
        tiny.config,
        text=dataclasses.replace(tiny.config.text, **SMALL_TEXT),
        vision=dataclasses.replace(tiny.config.vision, **SMALL_VISION | {"num_heads": 4}),
    )
    source = dataclasses.replace(tiny, config=config)
    export(source, random_params(config, seed=1), folder / "model", "float32")
    base = make_config(c.ModelSettings(str(folder / "model"), False, "float32", "full"))
    return dataclasses.replace(
        base, sft=dataclasses.replace(base.sft, **ROWS | {"micro_batch_rows": 8}), name="equality"
    )


def by_length(text: str, *_) -> Reward:
    """Rewards the length: random weights answer nothing right. Before a run, right ones must be."""
    return Reward(overall=len(text) / 100, accuracy=1.0, format=1.0)


def flat(name: str, tree) -> Arrays:
    """A tree of global arrays as NumPy, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {f"{name}{jax.tree_util.keystr(path)}": gather_to_host(x) for path, x in leaves}


def one_step(config: c.Config, workdir: Path) -> Arrays:
    """Losses, gradients, rollouts, metrics and new weights of a step of each stage."""
    with Preemption() as preemption, Progress(quiet=True) as progress:
        run = open_run(config, workdir, False, preemption, progress, ExitStack())
    start = StageInitializer(config, run.model, run.layout, run.checkpoints, lambda _: None)
    sft, grpo = stages(config)
    return _sft(run, start, sft) | _grpo(run, start, sft, grpo)


def _sft(run: Run, start: StageInitializer, stage: SftStage) -> Arrays:
    config, model = run.config, run.model.config
    batch = next(pipeline(run, stage, start=0))
    responses = encode_responses(batch.items, run.processor, config.rollout.max_new_tokens)
    shapes, rows = row_shapes(config, stage, run.compute.attention), stage.settings.micro_batch_rows
    packed = pack_step(batch, responses, shapes, rows, model)
    loss = stage.loss(model, run.compute)
    return _summed("sft", loss, start.params(stage), map(run.layout.put_batch, packed))


def _grpo(run: Run, start: StageInitializer, sft: SftStage, stage: GrpoStage) -> Arrays:
    """GRPO's step from the weights that SFT starts from."""
    config = run.config
    optimizer = stage.optimizer(config)
    state = start.state(stage, optimizer, start.params(sft))
    loss = stage.loss(run.model.config, run.compute)
    made = Grpo(
        stage.settings,
        config.rollout,
        run.scorer,
        run.engine,
        loss,
        optimizer,
        run.layout,
        Buckets.of(config),
        row_shapes(config, stage, run.compute.attention),
        run.processor,
        start.params(sft),
    )
    batch, key = next(pipeline(run, stage, start=0)), jax.random.key(0)
    scored = made._score(batch, made.sample(state.params, batch, key))
    updates, _ = made.micro_batches(state.params, batch, scored)
    found = _summed("grpo", loss, state.params, updates[0])
    state, metrics, *_ = made.step(state, batch, key, lambda _: batch)
    sampled = {k: v for k, v in vars(scored.rollout).items() if isinstance(v, np.ndarray)}
    rows = all_gather(prompt_rows(batch) | sampled)
    order = np.argsort(rows["index"])
    found |= {f"rollout/{name}": rows[name][order] for name in sampled}
    clock = ("perf/", "memory/")
    found |= {f"metrics/{k}": np.float64(v) for k, v in metrics.items() if not k.startswith(clock)}
    return found | flat("weights", state.params)


def _summed(name: str, loss, params, batches) -> Arrays:
    """A step's metrics and gradients, over its micro-batches."""
    gradients, total, shardings = None, {}, gradient_shardings(params)
    for batch in batches:
        more, sums = micro_gradients(loss, params, {}, batch, shardings)
        gradients = more if gradients is None else add_gradients(gradients, more)
        for key, value in sums.items():
            total[key] = total.get(key, 0.0) + float(value)
    losses = {k: np.float64(v) for k, v in total.items() if k.startswith("loss/")}
    return {f"{name} {k}": v for k, v in losses.items()} | flat(f"{name} gradient", gradients)


def apart(ours: Arrays, theirs: Arrays, begins: str, smallest: float = 0.0) -> float:
    """The largest max|a - b| / max|b| of arrays of some names; `smallest` bounds the divisor."""
    names = [name for name in theirs if name.startswith(begins)]
    assert names and ours.keys() == theirs.keys()
    return max(
        float(np.abs(ours[n] - theirs[n]).max() / max(np.abs(theirs[n]).max(), smallest, 1e-30))
        for n in names
    )


_CANCELS = 1e-2  # sums of terms near 1 that are next to nothing are held to a millionth

MEASURES: dict[str, Callable[[Arrays, Arrays], float]] = {
    "sampled tokens that differ": lambda a, b: float(
        (a["rollout/tokens"] != b["rollout/tokens"]).sum()
    ),
    "sampler's log-probabilities": lambda a, b: apart(a, b, "rollout/logprobs"),
    "SFT loss": lambda a, b: apart(a, b, "sft loss"),
    "SFT gradient": lambda a, b: apart(a, b, "sft gradient"),
    "GRPO loss": lambda a, b: apart(a, b, "grpo loss", _CANCELS),
    "GRPO gradient": lambda a, b: apart(a, b, "grpo gradient"),
    "metrics of a GRPO step": lambda a, b: apart(a, b, "metrics/", _CANCELS),
    "weights after it": lambda a, b: apart(a, b, "weights"),
}


def measured(folder: Path, config: c.Config, name: str) -> Arrays:
    """The step's arrays on a layout, from processes of its own."""
    processes, devices, mesh = LAYOUTS[name]
    place = folder / str(list(LAYOUTS).index(name))
    place.mkdir()
    config = dataclasses.replace(config, mesh=c.MeshSettings(**mesh))
    (place / "config").write_bytes(pickle.dumps(config))
    started = start_all(["-m", "tests.helpers.equality", f"--step={place}"], processes, devices)
    for process in started:
        out, errors = process.communicate()
        assert process.returncode == 0, out + errors
    with np.load(place / "found.npz") as file:
        return dict(file)


def table(found: dict[str, Arrays]) -> list[str]:
    """Markdown: one row for each measure, one column for each layout."""
    first, *others = found
    lines = [f"| largest difference to {first} | " + " | ".join(others) + " |"]
    lines.append("|---|" + "---|" * len(others))
    for name, measure in MEASURES.items():
        cells = (f"{measure(found[o], found[first]):.1e}" for o in others)
        lines.append(f"| {name} | " + " | ".join(cells).replace("0.0e+00", "0") + " |")
    return lines


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--step", type=Path, help="make the step of this folder")
    add_options(parser)
    args = parser.parse_args(argv)
    if args.step is None:
        with tempfile.TemporaryDirectory() as name:
            config = equality_config(Path(name))
            found = {layout: measured(Path(name), config, layout) for layout in LAYOUTS}
        print("\n".join(table(found)))
        return
    connect(args, 60)
    scorer.score_response = by_length
    found = one_step(pickle.loads((args.step / "config").read_bytes()), args.step / "run")
    if is_primary():
        np.savez(args.step / "found.npz", **found)


if __name__ == "__main__":
    main(sys.argv[1:])

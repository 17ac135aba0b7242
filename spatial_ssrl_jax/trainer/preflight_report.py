"""The report of `preflight` as a list for people."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from spatial_ssrl_jax.common.text import byte_size, duration
from spatial_ssrl_jax.trainer.preflight import PreflightReport, StageReport


def print_report(report: PreflightReport, console: Console) -> None:
    """Prints a report of `preflight` as a short list."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in _lines(report):
        table.add_row(name, Text(text))  # names may hold what would be markup
    console.print(table, soft_wrap=True)
    for note in report["notes"]:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    if not report["problems"]:
        console.print("the run can start", highlight=False)


def _lines(report: PreflightReport) -> Iterator[tuple[str, str]]:
    devices, source, disk = report["devices"], report["source"], report["disk"]
    limit = devices["memory_bytes"]
    yield "model", report["model"]
    yield (
        "source",
        f"{source['spec']}: {source['train']:,} training, {source['heldout']:,} held out",
    )
    if len({spec for shares in source["shares"].values() for spec in shares}) > 1:
        for task, shares in source["shares"].items():
            parts = ", ".join(f"{share:.0%} {spec}" for spec, share in shares.items())
            yield f"source of {task}", parts
    yield (
        "devices",
        f"{devices['count']} x {devices['kind']}, {devices['processes']} process(es), memory "
        + (f"{byte_size(limit)} each" if limit else "unknown"),
    )
    done = report["steps_done"]
    yield "folder", report["workdir"] + (f", resumes after step {done}" if done else "")
    for name, stage in report["stages"].items():
        yield from ((f"{name}: {what}", text) for what, text in _stage_lines(stage))
    yield (
        "checkpoints",
        f"{byte_size(disk['checkpoints_bytes'])} in total, {byte_size(disk['there_bytes'])} present"
        + ("" if disk["free_bytes"] is None else f", {byte_size(disk['free_bytes'])} free"),
    )
    left = report["seconds_left"]
    yield "time left", "unknown until some steps are done" if left is None else duration(left)


def _stage_lines(stage: StageReport) -> Iterator[tuple[str, str]]:
    limit = stage.get("response_tokens_at_most")
    response = f"at most {limit:,}" if limit else f"{stage.get('response_tokens', 0):,}"
    left = f", {stage['steps_left']:,} left" if stage["steps_left"] < stage["steps"] else ""
    tokens, patches = stage["bucket"]
    padding = f"{stage['padding_share']:.0%} padding"
    memory = dict(stage["memory_bytes_a_device"])
    total = byte_size(memory.pop("sum"))
    parts = ", ".join(f"{n.replace('_', ' ')} {byte_size(b)}" for n, b in memory.items() if b)
    yield "steps", f"{stage['steps']:,} of {stage['prompts']:,} prompts{left}"
    yield "tokens a step", f"{stage['prompt_tokens']:,} of prompts, {response} of responses"
    yield (
        f"first {stage['measured_prompts']} prompts",
        f"bucket of {tokens:,} tokens and {patches:,} patches, {padding}",
    )
    yield "host memory", f"{byte_size(stage['batch_bytes'])} a batch of prompts"
    yield "parameters", f"{stage['trained']:,} trained, {stage['frozen']:,} frozen"
    yield "memory a device", f"about {total} without activations, an estimate: {parts}"
    yield "a checkpoint", byte_size(stage["checkpoint_bytes"])

"""A plan as text: a table of its programs, and a sentence for each that does not fit."""

from collections.abc import Iterator

from spatial_ssrl_jax.planning.planner import Plan

_GIB = 2**30


def problems(plan: Plan) -> list[str]:
    """A sentence for every program that does not fit: its size, its largest parts, what helps."""
    found = []
    for cost in plan.programs:
        if cost.fits:
            continue
        parts = {
            "its arguments": cost.argument_bytes,
            "its temporaries": cost.temp_bytes,
            "its results": cost.output_bytes,
            **cost.beside,
        }
        named = ", ".join(
            f"{n} {gib(b)}" for n, b in sorted(parts.items(), key=lambda i: -i[1])[:4]
        )
        largest = max(cost.largest_buffers, key=lambda b: b.bytes, default=None)
        if largest:
            named += f"; the largest buffer is {largest.name}, {gib(largest.bytes)}"
        of = f" of {gib(plan.hbm_bytes)}" if plan.hbm_bytes else ""
        found.append(
            f"{cost.name} needs {gib(cost.peak_bytes)}{of} ({named}): {_advice(cost.setting)}."
        )
    return found


def _advice(setting: str) -> str:
    if setting == "mesh.fsdp":
        return (
            "raise mesh.fsdp, use more devices, store moments in host memory "
            "(optim.offload=True), or train adapters alone (lora.rank=64)"
        )
    sampling = setting == "rollout.batch_prompts"
    other = "raise rollout.tensor, lower" if sampling else "model.attention_chunk,"
    sizes = "the largest bucket or rollout.max_new_tokens"
    return f"lower {setting}, {other} {sizes}, or use more devices"


def gib(size: float) -> str:
    """A size in bytes as text, in GiB."""
    return f"{size / _GIB:.2f} GiB"


def lines(plan: Plan) -> Iterator[str]:
    """The plan as a table with a line a program; all numbers are of one device."""
    memory = f"{gib(plan.hbm_bytes)} each" if plan.hbm_bytes else "memory unknown"
    yield f"{plan.topology}: {plan.devices} devices, {memory}; all numbers are a device's"
    yield (
        f"{'program':<20}{'runs':>6}{'peak GiB':>10}{'args':>8}{'temps':>8}{'beside':>8}"
        f"{'TFLOPs':>9}{'GB moved':>10}{'GB sent':>9}{'DCN':>7}{'seconds':>10}  {'bound':<8}"
        f"{'compiled':>9}"
    )
    for cost in plan.programs:
        sizes = (cost.argument_bytes, cost.temp_bytes, sum(cost.beside.values()))
        seconds = cost.estimated_seconds
        yield (
            f"{cost.name:<20}{cost.runs:>6g}{cost.peak_bytes / _GIB:>10.2f}"
            + "".join(f"{size / _GIB:>8.2f}" for size in sizes)
            + f"{cost.flops / 1e12:>9.3f}{cost.bytes_accessed / 1e9:>10.2f}"
            f"{cost.collective_bytes / 1e9:>9.2f}{cost.far_bytes / 1e9:>7.2f}"
            + (f"{'unknown':>10}" if seconds is None else f"{seconds:>10.4f}")
            + f"  {cost.bound or 'unknown':<8}{cost.compile_seconds:>7.0f} s"
            + ("" if cost.fits else "  does not fit")
        )
    yield from problems(plan)
    step = plan.step
    if step.decode_seconds is not None:
        yield f"decoding of a step: {step.decode_seconds:.1f} s at least"
    if step.estimated_seconds is not None and step.tokens_per_second_per_chip is not None:
        yield (
            f"a step: {step.estimated_seconds:.1f} s at least, "
            f"{step.tokens_per_second_per_chip:.0f} tokens/s a chip at most"
        )

"""Bytes in a compiled program's text: by hand on a small text, and on real programs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from spatial_ssrl_jax.planning.hlo import HloModule, array_bytes
from spatial_ssrl_jax.planning.hlo_collectives import group_ids, group_size
from spatial_ssrl_jax.planning.hlo_traffic import program_traffic

# A loop of 3 iterations that gathers a layer's quarter, multiplies, and writes one row; for a TPU.
TEXT = """HloModule jit_f, is_scheduled=true

%slice_layer (p0: bf16[3,8,8], p1: s32[]) -> bf16[1,8,8] {
  %p0 = bf16[3,8,8]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %layer = bf16[1,8,8]{2,1,0:S(1)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,8}
}

%write_row (q0: f32[100,8], q1: f32[1,8], q2: s32[]) -> f32[100,8] {
  %q0 = f32[100,8]{1,0} parameter(0)
  %q1 = f32[1,8]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %row = f32[100,8]{1,0} dynamic-update-slice(%q0, %q1, %q2, %none)
}

%body (b: (s32[], bf16[3,8,8], f32[100,8], f32[1,8])) -> (s32[], bf16[3,8,8], f32[100,8], f32[1,8]) {
  %b = (s32[]{:T(128)}, bf16[3,8,8]{2,1,0}, f32[100,8]{1,0}, f32[1,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %w = bf16[3,8,8]{2,1,0} get-tuple-element(%b), index=1
  %cache = f32[100,8]{1,0} get-tuple-element(%b), index=2
  %new = f32[1,8]{1,0} get-tuple-element(%b), index=3
  %sliced = bf16[1,8,8]{2,1,0:S(1)} fusion(%w, %i), kind=kLoop, calls=%slice_layer
  %gathered = bf16[4,8,8]{2,1,0:S(1)} all-gather(%sliced), replica_groups=GROUPS, dimensions={0}
  %written = f32[100,8]{1,0} fusion(%cache, %new, %i), kind=kLoop, calls=%write_row
  ROOT %out = (s32[], bf16[3,8,8]{2,1,0}, f32[100,8]{1,0}, f32[1,8]{1,0}) tuple(%i, %w, %written, %new)
}

%cond (c: (s32[], bf16[3,8,8], f32[100,8], f32[1,8])) -> pred[] {
  %c = (s32[], bf16[3,8,8]{2,1,0}, f32[100,8]{1,0}, f32[1,8]{1,0}) parameter(0)
  %k = s32[] get-tuple-element(%c), index=0
  %end = s32[] constant(4)
  ROOT %less = pred[] compare(%k, %end), direction=LT
}

ENTRY %main (x: bf16[3,8,8], y: f32[100,8], z: f32[1,8]) -> f32[100,8] {
  %x = bf16[3,8,8]{2,1,0} parameter(0)
  %y = f32[100,8]{1,0} parameter(1)
  %z = f32[1,8]{1,0} parameter(2)
  %one = s32[] constant(1)
  %init = (s32[], bf16[3,8,8]{2,1,0}, f32[100,8]{1,0}, f32[1,8]{1,0}) tuple(%one, %x, %y, %z)
  %loop = (s32[], bf16[3,8,8]{2,1,0}, f32[100,8]{1,0}, f32[1,8]{1,0}) while(%init), condition=%cond, body=%body
  ROOT %result = f32[100,8]{1,0} get-tuple-element(%loop), index=2
}
"""  # noqa: E501
GROUPS = ("[2,4]<=[8]", "{{0,1,2,3},{4,5,6,7}}", "mesh['a'=2,'b'=4] {'b'}")


def compiled_text(function: Callable[..., Any], *args: Any) -> str:
    text = jax.jit(function).lower(*args).compile().as_text()
    assert text is not None
    return text


@pytest.mark.parametrize("groups", GROUPS)
def test_a_loop_counts_its_iterations_and_only_what_they_touch(groups: str):
    """From 1 to 4 is 3 iterations; each reads a layer of 128 bytes, and reads and writes a row of
    32; each of 4 devices sends its 128 bytes 3 times. Both fusions read the index, 4 bytes, and the
    condition takes 9: two numbers and a truth value."""
    traffic = program_traffic(TEXT.replace("GROUPS", groups))
    assert traffic.memory == 3 * (128 + 4 + 32 + 32 + 4 + 9)
    assert traffic.network == 3 * 3 * 128


@pytest.mark.parametrize(
    ("there", "instead", "trip_count"),
    [
        ("compare(%k, %end)", "compare(%k, %end)", 3),
        ("compare(%k, %end)", "compare(%absent, %end)", None),
        ("compare(%k, %end)", "compare(%k, %absent)", None),
        ("%end = s32[] constant(4)", "%end = s32[] constant({...})", None),
        ("%one = s32[] constant(1)", "%one = s32[] constant({...})", None),
        ("condition=%cond, ", "", None),
    ],
)
def test_a_trip_count_that_the_text_does_not_give_is_unknown(
    there: str, instead: str, trip_count: int | None
):
    text = TEXT.replace("GROUPS", GROUPS[0])
    assert there in text
    module = HloModule(text.replace(there, instead))
    main = module.computations["main"]
    assert module.trip_count(main, main.by_name["loop"]) == trip_count


def test_a_fused_condition_that_compares_something_absent_has_no_trip_count():
    """The fusion's second operand is not in the condition's computation."""
    fused = """%less_than (l0: s32[], l1: s32[]) -> pred[] {
  %l0 = s32[] parameter(0)
  %l1 = s32[] parameter(1)
  ROOT %compared = pred[] compare(%l0, %l1), direction=LT
}

%body ("""
    text = TEXT.replace("GROUPS", GROUPS[0]).replace("%body (", fused, 1)
    call = "fusion(%k, %end), kind=kLoop, calls=%less_than"
    text = text.replace("compare(%k, %end), direction=LT", call)
    for wanted, changed in ((3, text), (None, text.replace("(%k, %end)", "(%k, %absent)"))):
        module = HloModule(changed)
        main = module.computations["main"]
        assert module.trip_count(main, main.by_name["loop"]) == wanted


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[2,3]{1,0:T(8,128)(2,1)}", 12),
        ("f32[]", 4),
        ("(pred[5], s4[4], u8[2]{0:S(1)})", 7),
        ("token[]", 0),
        ("f8e4m3fn[3]", 3),
    ],
)
def test_bytes_of_a_shape(shape: str, size: float):
    assert array_bytes(shape) == size


def test_groups_of_part_of_an_axis():
    assert group_size("replica_groups=mesh['a'=8,'b'=2] {'a':(1)4, 'b'}, x") == 8
    assert group_size("channel_id=1") == 1


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2]]),
        ("source_target_pairs={{0,2},{2,0}}, x", [[0, 2], [2, 0]]),
        ("channel_id=1", [[0]]),
    ],
)
def test_the_devices_of_a_collectives_groups(text: str, ids: list[list[int]]):
    assert group_ids(text).tolist() == ids


def test_traffic_between_slices_counts_apart():
    """Four devices gather 128 bytes of each: in slices of 4 nothing leaves them; in slices of 2
    each also sends its shard to the other one; in slices of 1 all goes between slices."""
    text = TEXT.replace("GROUPS", GROUPS[0])
    for size, inside, between in ((4, 3, 0), (2, 3, 1), (1, 0, 3)):
        traffic = program_traffic(text, size)
        assert (traffic.network, traffic.dcn) == (3 * 128 * inside, 3 * 128 * between)


def test_a_real_program_touches_each_layer_once_an_iteration():
    """A CPU copies a layer out of the stack and reads the copy: three times its bytes, not 7 x 3 of
    the whole stack; the rest of its traffic is activations, under a tenth."""
    weights, x = jnp.zeros((7, 256, 256)), jnp.zeros((2, 256))

    def run(weights: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    traffic = program_traffic(compiled_text(run, weights, x))
    assert weights.nbytes <= traffic.memory < 3.1 * weights.nbytes and traffic.network == 0


def test_loops_of_unknown_length_and_branches():
    def run(x: jax.Array, go: float, full: bool) -> jax.Array:
        branch = lambda x: jax.lax.cond(full, lambda x: jnp.sort(x) + 1, lambda x: x, x)  # noqa: E731
        return jax.lax.while_loop(lambda x: x[0] < go, lambda x: jnp.cumsum(branch(x)), x)

    text = compiled_text(run, jnp.zeros(4096), 1.0, True)
    one, ten = (program_traffic(text, trip_count=count).memory for count in (1, 10))
    assert ten > 5 * one
    assert program_traffic(text, trip_count=10, expensive_fraction=0.0).memory < ten


@pytest.mark.parametrize(("place", "times"), [("S(1)", 1), ("", 2)])
def test_a_slice_that_is_prefetched_counts_alone(place: str, times: int):
    """Read once, and written where it does not stay on the chip; not all of its operand."""
    text = f"""HloModule jit_f, is_scheduled=true

ENTRY %main (x: bf16[64,8]) -> bf16[16,8] {{
  %x = bf16[64,8]{{1,0}} parameter(0)
  %start = ((bf16[64,8]{{1,0}}), bf16[16,8]{{1,0:T(8,128){place}}}, s32[]{{:S(2)}}) slice-start(%x), slice={{[0:16], [0:8]}}
  ROOT %part = bf16[16,8]{{1,0:T(8,128){place}}} slice-done(%start)
}}
"""  # noqa: E501
    assert program_traffic(text).memory == times * 16 * 8 * 2


ASYNC = """HloModule jit_f, is_scheduled=true

%begin (b0: bf16[2,8]) -> (bf16[2,8], bf16[8,8]) {
  %b0 = bf16[2,8]{1,0:S(1)} parameter(0)
  %gather.1 = bf16[8,8]{1,0} all-gather(%b0), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %begun = (bf16[2,8]{1,0:S(1)}, bf16[8,8]{1,0}) tuple(%b0, %gather.1)
}

%beside (m0: bf16[2,8], m1: bf16[8,8], m2: bf16[100,8]) -> (bf16[100,8], bf16[2,8], bf16[8,8]) {
  %m0 = bf16[2,8]{1,0:S(1)} parameter(0)
  %m1 = bf16[8,8]{1,0} parameter(1)
  %m2 = bf16[100,8]{1,0} parameter(2)
  %twice = bf16[100,8]{1,0} add(%m2, %m2)
  %gather.2 = bf16[8,8]{1,0} all-gather(%m0), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %both = (bf16[100,8]{1,0}, bf16[2,8]{1,0:S(1)}, bf16[8,8]{1,0}) tuple(%twice, %m0, %m1)
}

%end (e0: bf16[2,8], e1: bf16[8,8]) -> bf16[8,8] {
  %e0 = bf16[2,8]{1,0:S(1)} parameter(0)
  %e1 = bf16[8,8]{1,0} parameter(1)
  ROOT %gather.3 = bf16[8,8]{1,0} all-gather(%e0), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
}

ENTRY %main (x: bf16[2,8], y: bf16[100,8]) -> bf16[100,8] {
  %x = bf16[2,8]{1,0:S(1)} parameter(0)
  %y = bf16[100,8]{1,0} parameter(1)
  %start = (bf16[2,8]{1,0:S(1)}, bf16[8,8]{1,0}) fusion(%x), kind=kCustom, calls=%begin
  %s0 = bf16[2,8]{1,0:S(1)} get-tuple-element(%start), index=0
  %s1 = bf16[8,8]{1,0} get-tuple-element(%start), index=1
  %work = (bf16[100,8]{1,0}, bf16[2,8]{1,0:S(1)}, bf16[8,8]{1,0}) fusion(%s0, %s1, %y), kind=kOutput, calls=%beside
  %w0 = bf16[100,8]{1,0} get-tuple-element(%work), index=0
  %w1 = bf16[2,8]{1,0:S(1)} get-tuple-element(%work), index=1
  %w2 = bf16[8,8]{1,0} get-tuple-element(%work), index=2
  %done = bf16[8,8]{1,0} fusion(%w1, %w2), kind=kCustom, calls=%end
  ROOT %out = bf16[100,8]{1,0} copy(%w0)
}
"""  # noqa: E501


def test_a_gather_that_runs_beside_other_work_counts_once():
    """32 bytes sent to three others, 128 written; the work reads and writes 1,600, its copy too."""
    traffic = program_traffic(ASYNC)
    assert traffic.network == 3 * 32
    assert traffic.memory == 128 + 2 * 1600 + 2 * 1600


SCATTER = """HloModule jit_f, is_scheduled=true

%sum_and_take (s0: bf16[8,8]) -> bf16[2,8] {
  %s0 = bf16[8,8]{1,0} parameter(0)
  %sum = bf16[8,8]{1,0} all-reduce(%s0), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %own = bf16[2,8]{1,0} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={2,8}
}

ENTRY %main (x: bf16[8,8]) -> bf16[2,8] {
  %x = bf16[8,8]{1,0} parameter(0)
  %ready = token[] after-all()
  %far = (bf16[8,8]{1,0}, u32[], token[]) send(%x, %ready), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %own = bf16[2,8]{1,0} fusion(%x), kind=kCustom, calls=%sum_and_take
}
"""  # noqa: E501


def test_an_all_reduce_of_which_each_device_takes_its_shard_is_a_reduce_scatter():
    assert program_traffic(SCATTER).network == 128 * 3 / 4


@pytest.mark.parametrize(("slices", "times"), [(2, 1.0), (4, 1.5)])
def test_what_hosts_send_between_slices_goes_over_the_dcn(slices: int, times: float):
    """A ring of n all-reduces with 2 (n - 1) / n of the bytes."""
    assert program_traffic(SCATTER, 4, slices).dcn == times * 128

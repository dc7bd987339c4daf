"""Counting in the text of a compiled program, on small programs written by hand: each planted change is noticed."""

import pytest

from medfuse_jax.bench import hlo

# Two loops, one inside the other, a CUDA graph of two kernels, copies, a collective, and an update in place.
_PROGRAM = """HloModule jit_step, is_scheduled=true

%sliced (big: f32[64,16], i: s32[]) -> f32[1,16] {
  %big = f32[64,16]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice.1 = f32[1,16]{1,0} dynamic-slice(%big, %i, %zero), dynamic_slice_sizes={1,16}
}

%updated (whole: f32[64,16], row: f32[1,16], j: s32[]) -> f32[64,16] {
  %whole = f32[64,16]{1,0} parameter(0)
  %row = f32[1,16]{1,0} parameter(1)
  %j = s32[] parameter(2)
  %nought = s32[] constant(0)
  ROOT %update.1 = f32[64,16]{1,0} dynamic-update-slice(%whole, %row, %j, %nought)
}

%command_buffer (x.1: f32[16]) -> f32[16] {
  %x.1 = f32[16]{0} parameter(0)
  %first = f32[16]{0} negate(%x.1)
  ROOT %second = f32[16]{0} negate(%first)
}

%inner_body (carry.1: (s32[], f32[16])) -> (s32[], f32[16]) {
  %carry.1 = (s32[], f32[16]{0}) parameter(0)
  %count.1 = s32[] get-tuple-element(%carry.1), index=0
  %value.1 = f32[16]{0} get-tuple-element(%carry.1), index=1
  %next.1 = f32[16]{0} tanh(%value.1)
  ROOT %out.1 = (s32[], f32[16]{0}) tuple(%count.1, %next.1)
}

%inner_condition (carry.2: (s32[], f32[16])) -> pred[] {
  %carry.2 = (s32[], f32[16]{0}) parameter(0)
  %count.2 = s32[] get-tuple-element(%carry.2), index=0
  %four = s32[] constant(4)
  ROOT %less.2 = pred[] compare(%count.2, %four), direction=LT
}

%outer_body (carry.3: (s32[], f32[16], s32[])) -> (s32[], f32[16], s32[]) {
  %carry.3 = (s32[], f32[16]{0}, s32[]) parameter(0)
  %inner = (s32[], f32[16]{0}) while(%carry.3), condition=%inner_condition, body=%inner_body
  %value.3 = f32[16]{0} get-tuple-element(%inner), index=1
  %graph = f32[16]{0} call(%value.3), to_apply=%command_buffer
  ROOT %out.3 = (s32[], f32[16]{0}, s32[]) tuple(%graph)
}

%outer_condition (carry.4: (s32[], f32[16], s32[])) -> pred[] {
  %carry.4 = (s32[], f32[16]{0}, s32[]) parameter(0)
  %count.4 = s32[] get-tuple-element(%carry.4), index=0
  %limit = s32[] get-tuple-element(%carry.4), index=2
  ROOT %less.4 = pred[] compare(%count.4, %limit), direction=LT
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (weight: f32[64,16], series: f32[64,16], n: s32[]) -> (f32[64,16], f32[64,16]) {
  %weight = f32[64,16]{1,0} parameter(0)
  %series = f32[64,16]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %copy.1 = f32[64,16]{1,0} copy(%weight), metadata={op_name="jit(step)/copy"}
  %at = f32[1,16]{1,0} fusion(%series, %n), kind=kLoop, calls=%sliced
  %put = f32[64,16]{1,0} fusion(%series, %at, /*index=2*/%n), kind=kLoop, calls=%updated
  %start = (s32[], f32[16]{0}, s32[]) tuple(%n, %at, %n)
  %outer = (s32[], f32[16]{0}, s32[]) while(%start), condition=%outer_condition, body=%outer_body
  %gemm = (bf16[16,16]{1,0}, u8[0]{0}) custom-call(%copy.1), custom_call_target="gemm", backend_config={"a":"("}
  %reduce-start = f32[16]{0} all-reduce-start(%at), replica_groups={{0,1}}, to_apply=%add
  %reduce-done = f32[16]{0} all-reduce-done(%reduce-start)
  %loss = f32[] all-reduce(%n), replica_groups={{0,1}}, to_apply=%add
  ROOT %result = (f32[64,16]{1,0}, f32[64,16]{1,0}) tuple(%copy.1, %put)
}
"""
_COPY, _SLICE = 2 * 64 * 16 * 4, 16 * 4


def _changed(old: str, new: str) -> hlo.Program:
    assert _PROGRAM.count(old) == 1, old
    return hlo.parse(_PROGRAM.replace(old, new))


def _launches(program: hlo.Program, trips: int) -> int:
    return sum(times for _, times in hlo.executed(program, trips))


def test_a_loop_counts_once_a_trip_and_a_graph_once():
    program = hlo.parse(_PROGRAM)
    # Outside the loops: the copy, two fusions, the product and two all-reduces. A trip: four steps and one graph.
    assert _launches(program, 1) == 6 + 5 and _launches(program, 16) == 6 + 16 * 5
    outer, inner = hlo.loops(program, 16)
    assert (outer.trips, outer.is_fixed, outer.launches, outer.depth) == (16, False, 5, 0)
    assert (inner.trips, inner.is_fixed, inner.launches, inner.depth) == (4, True, 1, 1)


@pytest.mark.parametrize(
    ("old", "new", "a_trip"),
    [
        ("%four = s32[] constant(4)", "%four = s32[] constant(8)", 9),
        ("body=%inner_body", 'body=%inner_body, backend_config={"known_trip_count":{"n":"2"}}', 3),
        ("to_apply=%command_buffer", "to_apply=%inner_body", 5),  # a plain call: its launches count
        ("%next.1 = f32[16]{0} tanh(%value.1)", "%next.1 = f32[16]{0} bitcast(%value.1)", 1),
        ("direction=LT\n}\n\n%outer_body", "direction=NE\n}\n\n%outer_body", 17),  # no fixed number of trips: 16
    ],
)
def test_a_changed_loop_changes_the_launches(old, new, a_trip):
    assert hlo.loops(_changed(old, new), 16)[0].launches == a_trip


def test_of_two_branches_the_longer_counts():
    loop = "%outer = (s32[], f32[16]{0}, s32[]) while(%start), condition=%outer_condition, body=%outer_body"
    branch = "%outer = f32[16]{0} conditional(%n, %at, %at), branch_computations={%add, %command_buffer}"
    assert _launches(_changed(loop, branch), 1) == 6 + 2


def test_traffic_counts_slices_and_updates_in_place():
    program = hlo.parse(_PROGRAM)
    entry = {launch.name: hlo._launch_bytes(program, launch) for launch, _ in hlo.executed(program)}
    assert entry["copy.1"] == _COPY
    assert entry["at"] == 2 * _SLICE + 4  # the slice and its number, not the series
    assert entry["put"] == 2 * _SLICE + 4  # the row that is read and written
    assert entry["gemm"] == 64 * 16 * 4 + 16 * 16 * 2
    kernels = 2 * 16 * 4
    outside = sum(entry[name] for name in ("copy.1", "at", "put", "gemm", "reduce-start", "loss"))
    assert hlo.traffic(program, 16) == outside + 16 * (4 + 2) * kernels
    whole = _changed("dynamic-slice(%big, %i, %zero)", "reduce(%big, %i)")
    assert hlo.traffic(whole) - hlo.traffic(program) == 64 * 16 * 4 - _SLICE


@pytest.mark.parametrize(
    ("shape", "num_bytes"),
    [
        ("f32[16,256]{1,0}", 4 * 16 * 256),
        ("(bf16[3,4]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/pred[5]{0}, s64[])", 24 + 5 + 8),
        ("f8e4m3fn[7]{0}", 7),
        ("s4[8]{0}", 4),
        ("(u8[0]{0}, token[])", 0),
    ],
)
def test_bytes_of_a_shape(shape, num_bytes):
    assert hlo.num_bytes(shape) == num_bytes


def test_copies_of_float32_weights_are_found_by_shape():
    assert hlo.weight_copies(hlo.parse(_PROGRAM), {(64, 16), (3, 3)}) == 1
    assert hlo.weight_copies(hlo.parse(_PROGRAM), {(16, 64)}) == 0
    half = _changed("%copy.1 = f32[64,16]{1,0} copy(%weight)", "%copy.1 = bf16[64,16]{1,0} copy(%weight)")
    assert hlo.weight_copies(half, {(64, 16)}) == 0
    fast = _changed("%copy.1 = f32[64,16]{1,0} copy(%weight)", "%copy.1 = f32[64,16]{1,0:T(8,128)S(1)} copy(%weight)")
    assert hlo.weight_copies(fast, {(64, 16)}) == 0


def test_collectives_and_those_of_one_number():
    assert hlo.collectives(hlo.parse(_PROGRAM)) == (2, 1)
    assert hlo.collectives(_changed("all-reduce(%n)", "all-reduce(%series)")) == (2, 0)
    in_loop = _changed("%next.1 = f32[16]{0} tanh(%value.1)", "%next.1 = f32[16]{0} all-gather(%value.1)")
    assert hlo.collectives(in_loop, 16) == (2 + 64, 1)


def test_collectives_as_written():
    text = """
    %1 = "stablehlo.all_reduce"(%0) <{replica_groups = dense<[[0, 1]]> : tensor<1x2xi64>}> ({
    ^bb0(%a: tensor<f32>, %b: tensor<f32>):
      %c = stablehlo.add %a, %b : tensor<f32>
      stablehlo.return %c : tensor<f32>
    }) : (tensor<64xf32>) -> tensor<64xf32>
    %2 = "stablehlo.all_reduce"(%1) <{replica_groups = dense<[[0, 1]]> : tensor<1x2xi64>}> ({
    }) : (tensor<f32>) -> tensor<f32>
    %3 = "stablehlo.all_gather"(%2) <{all_gather_dim = 0 : i64}> : (tensor<1x1xf32>) -> tensor<2x1xf32>
    """
    assert hlo.written_collectives(text) == (3, 2)


def test_cycles_count_trips():
    timed = _PROGRAM.replace("tanh(%value.1)", 'tanh(%value.1), backend_config={"estimated_cycles":"10"}')
    timed = timed.replace("copy(%weight)", 'copy(%weight), backend_config={"estimated_cycles":"7"}')
    assert hlo.cycles(hlo.parse(timed), 16) == 7 + 16 * 4 * 10

"""Launches and CUDA graphs, counted in lists of thunks written by hand in XLA's form."""

import pytest

from medfuse_jax.bench import thunks

_LISTED = """\
000: kCommandBuffer [source       | next=012 (1)]
    001: kCustomKernel [source       | sink        ] loop_fusion grid: [8, 1, 1]
    002: kWhile         [prev=001 (1) | sink        ]
condition:
        003: kCustomKernel [source | sink] wrapped_compare
      body:
        004: kCopy         [source | sink] kCopy
        005: kConvolution  [source | sink]
012: kWhile         [prev=000 (1) | next=030 (1)]
condition:
    013: kCustomKernel [source | sink] wrapped_compare grid: [1, 1, 1]
  body:
    000: kCommandBuffer [source | sink]
        014: kCustomKernel [source       | next=015 (1)] a
        015: kCustomKernel [prev=014 (1) | sink        ] b
    016: kConvolution  [prev=000 (1) | sink        ]
030: kCustomKernel  [prev=012 (1) | sink        ] last
"""


def test_a_graph_is_one_launch_and_a_loop_launches_its_body_and_condition_once_a_trip():
    listed = thunks.parse(_LISTED)
    assert [thunk.kind for thunk in listed] == ["kCommandBuffer", "kWhile", "kCustomKernel"]
    assert [thunk.is_condition for thunk in listed[1].inside] == [True, False, False]
    counted = thunks.count(listed, trips=[7, 16])  # the first loop is in a graph
    assert counted == thunks.Launches(total=1 + 16 * 3 + 1, outside_loops=2, graphs=2, in_graphs=6)


def test_without_the_graph_around_it_every_kernel_of_a_loop_is_a_launch():
    text = _LISTED.replace("    000: kCommandBuffer", "    000: kSequential")
    assert thunks.count(thunks.parse(text), [7, 16]).total == 1 + 16 * 4 + 1


def test_loops_that_do_not_match_the_program_are_noticed():
    with pytest.raises(ValueError, match="more loops"):
        thunks.count(thunks.parse(_LISTED), [7, 16, 3])

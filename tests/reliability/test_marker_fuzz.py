"""A small part of the fuzzer: what is in a field of a raw table is in no message and no file beside the records."""

import random

from build_cases import write_tree
from reliability import marker_fuzz


def test_a_marker_is_found_nowhere(tmp_path):
    write_tree(tmp_path / "whole")
    for number in range(6):
        what, found = marker_fuzz.leaks(tmp_path / "whole", tmp_path / "marked", random.Random(f"1 {number}"))
        assert found == [], what

"""No message quotes a row: tables without a header line or with an open quote, and wrong lists."""

import gzip

import pytest
from build_cases import write_tree
from raw_tables import HEADERS

from data_prep import build
from data_prep.ehr import splits
from medfuse_jax.runtime.errors import UserError

MARKER = "MARKER"
TABLES = [f"iv/{folder}/{name}" for folder in ("hosp", "icu") for name in HEADERS]
TABLES += [f"cxr/mimic-cxr-2.0.0-{name}" for name in ("metadata", "chexpert", "split")]


def _no_header(lines):
    return lines[1:]


def _open_quote_in_the_header(lines):
    return ['"' + lines[0], *lines[1:]]


def _open_quote_in_a_row(lines):
    return [*lines[:2], '"' + lines[2], *lines[3:]]


def _open_quote_in_the_last_row(lines):
    return [*lines[:-1], '"' + lines[-1]]


def _other_separator(lines):
    return [line.replace(",", ";") for line in lines]


@pytest.mark.parametrize(
    "change",
    [_no_header, _open_quote_in_the_header, _open_quote_in_a_row, _open_quote_in_the_last_row, _other_separator],
)
def test_no_message_quotes_a_row_of_a_table(tmp_path, capsys, change):
    write_tree(tmp_path / "whole")
    tables = [name for name in TABLES if (tmp_path / "whole" / f"{name}.csv.gz").exists()]
    assert len(tables) == 9
    for name in tables:
        path = tmp_path / "whole" / f"{name}.csv.gz"
        whole = path.read_bytes()
        header, *lines = gzip.decompress(whole).decode().splitlines(keepends=True)
        # A marker in every text, and ids that are found in a message.
        lines = [line.replace("1000", f"{MARKER}1000") for line in lines]
        path.write_bytes(gzip.compress("".join(change([header, *lines])).encode()))
        try:
            build.build(tmp_path / "whole/iv", tmp_path / "whole/cxr", tmp_path / "out")
        except UserError as error:
            print(error)
        printed = "".join(capsys.readouterr())
        assert printed and MARKER not in printed and "200000" not in printed, name
        path.write_bytes(whole)


def test_no_message_quotes_a_row_of_a_list(tmp_path):
    (tmp_path / "val.csv").write_text(f"{MARKER}\n")
    with pytest.raises(UserError) as caught:
        splits.read_id_list(tmp_path / "val.csv")
    assert caught.value.row == 1 and MARKER not in str(caught.value)

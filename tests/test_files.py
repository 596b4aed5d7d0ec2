# SPDX-License-Identifier: Apache-2.0
"""What files hold: JSON as the standard library indents it."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtclip.files import csv_lines, note_older, to_json, unescape

SCALARS: Any = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False,
                                                          allow_infinity=False)  # fmt: skip
VALUES: Any = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


@given(st.dictionaries(st.text(), VALUES))
def test_json_is_that_of_the_standard_library_with_an_indent_of_one(value):
    assert to_json(value) == (json.dumps(value, ensure_ascii=True, indent=1) + "\n").encode()


def test_numbers_that_json_lacks_are_null_and_tuples_and_paths_are_lists_and_text():
    value = {"a": [1.0, math.nan, (True, None)], 2: Path("x"), "b": [], "c": {}, "d": [math.inf]}
    assert json.loads(to_json(value)) == {
        "a": [1.0, None, [True, None]], "2": "x", "b": [], "c": {}, "d": [None]
    }  # fmt: skip


@pytest.mark.parametrize("value", [{"a": "\ud800"}, {"\udcff": ["é", "\u2028", '"\\']}])
def test_letters_outside_ascii_are_escaped(value):
    assert json.loads(to_json(value)) == value
    assert to_json(value).isascii()


@given(st.lists(st.lists(st.text(st.characters()), min_size=2, max_size=3)))
def test_rows_of_csv_are_read_as_they_were_written(rows):
    text = csv_lines(rows)
    assert all(line.isprintable() for line in text.split("\n"))
    read = csv.reader(io.StringIO(text, newline=""))
    assert [[unescape(cell) for cell in row] for row in read] == rows
    assert csv_lines([["a", 1], ["b,c", ""]]) == 'a,1\n"b,c",\n'


def test_a_file_of_an_earlier_version_is_mentioned_once(tmp_path, caplog):
    for name in ("one", "other", "one"):
        note_older(tmp_path / name)
    assert [record.args[0] for record in caplog.records] == [
        str(tmp_path / name) for name in ("one", "other")
    ]

# SPDX-License-Identifier: Apache-2.0
"""Tables of several sources as one: rows, labels by name, roles, digests, and what is refused."""

from __future__ import annotations

import pytest
import torch

from vtclip.data.joined import join_records
from vtclip.data.records import Records


def table(classes: list[str], each: int, start: int = 0, width: int = 4) -> Records:
    label = torch.arange(len(classes)).repeat_interleave(each)
    image = torch.arange(1.0, 1 + len(label) * width).view(-1, width) + start
    text = torch.eye(max(width, len(classes)), width)[: len(classes)]
    names = [f"{classes[k]}/{row}.png" for row, k in enumerate(label.tolist())]
    return Records.from_tensors(image, label, text, classes, names=names)


def test_rows_keep_their_features_and_labels_go_by_name():
    train = table(["cat", "dog", "eel"], 4)
    test, val = table(["eel", "cat"], 2, start=100), table(["dog"], 3, start=500)
    whole = join_records(train, {"val": val, "test": test})
    assert whole.class_names == ["cat", "dog", "eel"]
    assert whole.roles is not None
    assert whole.roles.tolist() == [0] * 12 + [1] * 3 + [2] * 4
    assert whole.label.tolist() == [*train.label.tolist(), 1, 1, 1, 2, 2, 0, 0]
    assert whole.names[:12] == train.names
    assert whole.names[12:] == [f"val/{n}" for n in val.names] + [f"test/{n}" for n in test.names]
    rows = torch.tensor([18, 0, 13, 15])
    wanted = [part.batch(torch.tensor([row])).image for part, row in
              ((test, 3), (train, 0), (val, 1), (test, 0))]  # fmt: skip
    assert torch.equal(whole.batch(rows).image, torch.cat(wanted))
    assert whole.info["digests"]["images"] == train.info["digests"]["images"]
    assert whole.info["digests"]["test_images"] == test.info["digests"]["images"]
    some = test.select(torch.tensor([3, 1]))
    again = join_records(train, {"test": some})
    assert torch.equal(again.batch(torch.tensor([12, 13])).image, some.batch(torch.arange(2)).image)


def test_a_class_written_in_another_case_is_the_known_one_and_said(caplog):
    train = table(["red cat", "dog"], 2)
    whole = join_records(train, {"test": table(["Dog", "Red_Cat"], 1)})
    assert whole.class_names == train.class_names
    assert whole.label.tolist() == [0, 0, 1, 1, 1, 0]
    assert [record.getMessage() for record in caplog.records] == [
        "test: class 'Dog' is taken as 'dog'",
        "test: class 'Red_Cat' is taken as 'red cat'",
    ]


def test_names_that_would_meet_stay_two():
    train = table(["test"], 3)
    whole = join_records(train, {"test": table(["test"], 2)})
    assert len(set(whole.names)) == 5
    assert whole.names[3:] == ["_test/test/0.png", "_test/test/1.png"]


def test_other_classes_and_other_features_are_refused_by_role():
    train = table(["cat", "dog"], 2)
    with pytest.raises(ValueError, match=r"^val: class 'dgo' is none .*; did you mean 'dog'\?$"):
        join_records(train, {"val": table(["dgo"], 2)})
    with pytest.raises(ValueError, match="^test: its features have width 8, those of the training"):
        join_records(train, {"test": table(["cat"], 2, width=8)})

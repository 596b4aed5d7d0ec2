# SPDX-License-Identifier: Apache-2.0
"""The request of a fit: what is refused before any file is read, and what its record says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from vtclip.files import to_json
from vtclip.runs.request import FitRequest

NOWHERE = Path("nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "nope"}, "unknown method 'nope'"),
        ({"shots": -1}, "shots must be at least 0"),
        ({"seed": 2**32}, "seed must be in"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"overwrite": True, "resume": True}, "overwrite and resume exclude each other"),
        ({"overrides": {"lr": -1.0}}, "lr must be above 0"),
        ({"overrides": {"nope": 1}}, "unknown override 'nope'"),
        ({"method": "zeroshot", "pseudo_labels": True}, "learns nothing from images"),
        ({"pseudo_labels": True, "base_to_new": True}, "cannot be combined with base_to_new"),
        ({"method": "tip-adapter", "base_to_new": True}, "base_to_new: method must be one of"),
        ({"train_encoders": True, "spatial": "default"}, "train_encoders: spatial must be left"),
        ({"train_encoders": True, "method": "vtclip"}, "train_encoders: method must be rada"),
        ({"train_encoders": True}, "no such file or folder"),
    ],
)
def test_wrong_options_are_refused_before_the_source_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        FitRequest(source=NOWHERE, **{"method": "rada", **options})


@pytest.mark.parametrize(
    "options",
    [
        {"method": "rada", "overrides": {"epochs": 2, "head": {"penalty": "none"}}},
        {"method": "vtclip", "spatial": "default", "templates": ["a {}."], "augment_passes": 2},
        {"method": "rada", "base_to_new": True, "prompt": "two", "test_fraction": 0.3},
        {"method": "tip-adapter", "pseudo_labels": True, "seed": 4},
        {"method": "auto", "refit": True},
        {"method": "rada", "train_encoders": True, "overrides": {"batch_size": 4, "lr": 1e-4}},
    ],
)
def test_a_record_is_read_back_as_the_same_request(options, tmp_path):
    request = FitRequest(source=tmp_path, shots=2, **{"refit": False, **options})

    def record(request: FitRequest) -> dict[str, Any]:
        encoders = request.train_encoders
        settings = request.encoder_settings(6) if encoders else request.settings(2)
        config = request.as_config(2, settings, refit=bool(request.refit))
        read: dict[str, Any] = json.loads(to_json(config))
        return read

    config = record(request)
    again = FitRequest.from_config(config, method=request.method, shots=2, seed=request.seed)
    assert record(again) == config
    assert dataclasses.replace(again, overrides=request.overrides) == request

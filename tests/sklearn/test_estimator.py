# SPDX-License-Identifier: Apache-2.0
"""`vtclip.sklearn.FewShotClassifier`: scikit-learn's own checks, and equality with `vtclip.fit`."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tables
import torch

import vtclip
from vtclip.data.npz import open_npz
from vtclip.runs.adapter import load_adapter
from vtclip.train.rows import split_rows

pytest.importorskip("sklearn", reason="needs the extra sklearn")
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from vtclip.sklearn import FewShotClassifier

# check -> why it cannot pass
EXPECTED = {
    "check_estimators_dtypes": "its rows cut to integers hold zeros only, which have no direction",
}


def expected_failures(estimator: FewShotClassifier) -> dict[str, str]:
    return EXPECTED


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@parametrize_with_checks(
    [FewShotClassifier(), FewShotClassifier(method="zeroshot"), FewShotClassifier(method="gda")],
    expected_failed_checks=expected_failures,
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def features() -> dict[str, np.ndarray]:
    found = tables.animal_features()
    return {name: found[name] for name in found if name != "spatial"}


@pytest.fixture(scope="module")
def data(features: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """X, y of names, and the class texts by name."""
    names = features["classname"]
    texts = dict(zip(names.tolist(), features["text"], strict=True))
    return features["image"], names[features["label"]], texts


@pytest.mark.parametrize("method", ["proker", "takl", "tip-adapter-f", "linear-probe", "auto"])
def test_it_is_the_head_of_a_run_on_the_same_features(features, data, method, tmp_path):
    np.savez(tmp_path / "animals.npz", **features)
    run = vtclip.fit(tmp_path / "animals.npz", method=method, shots=4, out=tmp_path / "run", seed=3)
    records = open_npz(tmp_path / "animals.npz")
    split = split_rows(records, True, 4, 3, 0.5, run.result["config"]["draw"])
    assert split.digest == run.result["split"]
    X, y, texts = data
    train, val, test = (rows.numpy() for rows in (split.train, split.val, split.test))
    model = FewShotClassifier(method, text_features=texts, seed=3, logit_scale=records.logit_scale)
    model.fit(X[train], y[train], X[val], y[val])

    adapter = load_adapter(Path(run.folder))
    kept, mine = adapter.head.state_dict(), model.head_.state_dict()
    assert list(kept) == list(mine)
    for name, value in kept.items():
        assert torch.equal(value, mine[name]), name
    assert model.temperature_ == adapter.temperature
    assert model.score(X[test], y[test]) == run.accuracy
    told = {row["file"]: row["probability"] for row in run.rows if row["role"] == "test"}
    said = model.predict_proba(X[test]).max(axis=1)
    expected = [told[records.names[row]] for row in test]
    assert said == pytest.approx(np.array(expected), rel=1e-3, abs=1e-5)


def test_equal_seeds_give_equal_numbers_and_touch_no_other_draw(data):
    X, y, texts = data
    state = torch.get_rng_state()
    first, second = (
        FewShotClassifier("clip-adapter", text_features=texts, overrides={"epochs": 3}).fit(X, y)
        for _ in range(2)
    )
    assert np.array_equal(first.predict_proba(X), second.predict_proba(X))
    assert torch.equal(torch.get_rng_state(), state)
    other = FewShotClassifier("clip-adapter", text_features=texts, overrides={"epochs": 3}, seed=2)
    assert not np.array_equal(first.predict_proba(X), other.fit(X, y).predict_proba(X))


def test_texts_by_class_and_in_order_are_the_same_and_the_default_is_the_means(data):
    X, y, texts = data
    in_order = np.stack([texts[name] for name in sorted(texts)])
    models = [FewShotClassifier(text_features=given).fit(X, y) for given in (texts, in_order)]
    assert np.array_equal(models[0].predict_proba(X), models[1].predict_proba(X))
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    means = np.stack([unit[y == name].mean(axis=0) for name in sorted(texts)])
    alone = FewShotClassifier("zeroshot").fit(X, y)
    nearest = (unit @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T).argmax(axis=1)
    assert np.array_equal(alone.predict(X), alone.classes_[nearest])


def test_it_works_in_pipelines_searches_clones_and_pickles(data):
    X, y, _ = data
    model = make_pipeline(StandardScaler(), FewShotClassifier())
    search = GridSearchCV(model, {"fewshotclassifier__method": ["zeroshot", "proker"]}, cv=2)
    search.fit(X, y)
    assert search.best_score_ > 0.8
    fitted = FewShotClassifier("takl", overrides={"head": {"lam": 0.5}}).fit(X, y)
    again = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(again.predict_proba(X), fitted.predict_proba(X))
    fresh = clone(fitted)
    assert fresh.get_params() == fitted.get_params()
    with pytest.raises(NotFittedError):
        fresh.predict(X)
    assert fresh.set_params(method="gda").method == "gda"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "prokr"}, "unknown method 'prokr'; did you mean 'proker'?"),
        ({"method": "vtclip"}, "method vtclip needs spatial features"),
        ({"method": "coop"}, "method coop needs the text encoder"),
        ({"logit_scale": 0.0}, "logit_scale must be finite and above 0, got 0.0"),
        ({"seed": -1}, "seed must be in"),
        ({"text_features": np.ones((2, 3))}, r"text_features must be \[K, D\] = \[4, 16\]"),
        ({"text_features": {"ant": np.ones(16)}}, "must hold every class of y, lacks 'bee'"),
        ({"overrides": {"epochs": 3}}, "method proker has no training"),
    ],
)
def test_wrong_options_are_refused_in_one_line(data, options, message):
    X, y, _ = data
    with pytest.raises(ValueError, match=message) as caught:
        FewShotClassifier(**options).fit(X, y)
    assert "\n" not in str(caught.value)


def test_wrong_rows_are_refused(data):
    X, y, _ = data
    with pytest.raises(ValueError, match="X must hold no row of zeros, got 1, first 2"):
        FewShotClassifier().fit(np.where(np.arange(len(X))[:, None] == 2, 0, X), y)
    with pytest.raises(ValueError, match="given together"):
        FewShotClassifier().fit(X, y, X)
    with pytest.raises(ValueError, match="y_val must hold classes of y, got 'eel'"):
        FewShotClassifier().fit(X, y, X[:1], ["eel"])

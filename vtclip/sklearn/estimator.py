# SPDX-License-Identifier: Apache-2.0
"""A head on a matrix of features as a scikit-learn classifier."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from torch.nn import functional as F

from vtclip.data.records import Records
from vtclip.data.splits import Split
from vtclip.heads import HEADS, Head
from vtclip.heads.config import check_seed
from vtclip.names import pick
from vtclip.train import metrics
from vtclip.train.auto import fit_auto
from vtclip.train.calibration import decide
from vtclip.train.fit_head import choose_by, fit_head
from vtclip.train.methods import recipe_config
from vtclip.train.rows import TrainingRows
from vtclip.train.steps import TrainingRun

Array = np.ndarray[Any, Any]
CPU = torch.device("cpu")


class FewShotClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A method of vtclip on features [N, D] of a frozen image encoder.

        from vtclip.sklearn import FewShotClassifier

        model = FewShotClassifier(method="proker", text_features={"cat": cat, "dog": dog})
        model.fit(X, y)                      # image features [N, D], class names [N]
        model.predict_proba(X_new)           # [B, K], columns as model.classes_
        GridSearchCV(model, {"method": ["proker", "tip-adapter-f"]}).fit(X, y)

    method: a name of `vtclip.heads.HEADS` that reads image features alone; "auto" pools several.
    text_features: class texts, an array [K, D] in the order of the sorted classes or a dict from
        class to [D]. None takes the mean of each class's training rows, each of length 1, in their
        place: the zero-shot part of a method is then the nearest class mean, which has seen the
        training rows.
    logit_scale: by which cosines are multiplied, CLIP's exp(t) of its log-scale t; above 0.
    seed: of what is drawn in training, 0..2^32 - 1; equal seeds give equal results.
    overrides: fields of `vtclip.heads.FitConfig` in place of the method's recipe, as of
        `vtclip.fit`: {"epochs": 20, "head": {"lam": 0.3}}.

    Rows are scaled to length 1 inside. Fitted attributes: `classes_` [K], sorted; `n_features_in_`;
    `head_`, the `vtclip.heads.Head`, float32; `temperature_`, of validation rows, else 1.0.
    Predictions are computed in float64, so that they do not depend on the other rows of a call.
    """

    def __init__(
        self,
        method: str = "proker",
        *,
        text_features: Any = None,
        logit_scale: float = 100.0,
        seed: int = 1,
        overrides: Mapping[str, object] | None = None,
    ) -> None:
        self.method = method
        self.text_features = text_features
        self.logit_scale = logit_scale
        self.seed = seed
        self.overrides = overrides

    def fit(self, X: Any, y: Any, X_val: Any = None, y_val: Any = None) -> FewShotClassifier:
        """Fit to features X [N, D] and labels y [N]; returns itself.

        X_val, y_val: rows that are not trained on; they choose what the method chooses by
            validation and set `temperature_`, as those of `vtclip.fit` do. Without them options
            keep their defaults, and "auto" cross-validates.
        """
        self._check_options()
        X, y = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=1)
        check_classification_targets(y)
        self.classes_, label = np.unique(y, return_inverse=True)
        rows, labels = [_rows(X)], [torch.from_numpy(np.asarray(label)).long()]
        if (X_val is None) != (y_val is None):
            raise ValueError("fit: X_val and y_val must be given together")
        if X_val is not None:
            X_val = validate_data(self, X_val, reset=False, dtype=np.float64)
            rows.append(_rows(X_val))
            labels.append(self._known(y_val, len(X_val)))
        records = self._records(torch.cat(rows), torch.cat(labels), len(X))
        self._fit(records, len(X))
        return self

    def _check_options(self) -> None:
        kind = HEADS[pick("method", self.method, HEADS)]
        for needs, what in ((kind.needs_spatial, "spatial features"),
                            (kind.needs_text_encoder, "the text encoder")):  # fmt: skip
            if needs:
                raise ValueError(f"method {self.method} needs {what}, which a matrix does not have")
        scale: object = self.logit_scale
        if not isinstance(scale, (int, float, np.number)) or not (
            math.isfinite(scale) and scale > 0
        ):
            raise ValueError(f"logit_scale must be finite and above 0, got {scale!r}")
        check_seed(self.seed)

    def _known(self, y: Any, count: int) -> Tensor:
        """Labels [n] as places in `classes_`."""
        values = np.asarray(y)
        if values.shape != (count,):
            raise ValueError(f"y_val must be [{count}] as X_val, got {list(values.shape)}")
        place = {value: k for k, value in enumerate(self.classes_.tolist())}
        unknown = [value for value in values.tolist() if value not in place]
        if unknown:
            raise ValueError(f"y_val must hold classes of y, got {unknown[0]!r}")
        return torch.tensor([place[value] for value in values.tolist()])

    def _records(self, image: Tensor, label: Tensor, train: int) -> Records:
        names = [str(k) for k in range(len(self.classes_))]
        text = self._texts(image[:train], label[:train])
        return Records.from_tensors(image, label, text, names, logit_scale=float(self.logit_scale))

    def _texts(self, image: Tensor, label: Tensor) -> Tensor:
        """Class texts [K, D] float32."""
        texts, shape = self.text_features, (len(self.classes_), image.shape[1])
        if texts is None:
            one_hot = F.one_hot(label, shape[0]).double()
            means = one_hot.mT @ F.normalize(image.double(), dim=-1) / one_hot.sum(dim=0)[:, None]
            return F.normalize(means, dim=-1).float()
        if isinstance(texts, Mapping):
            lacks = [value for value in self.classes_.tolist() if value not in texts]
            if lacks:
                raise ValueError(f"text_features must hold every class of y, lacks {lacks[0]!r}")
            texts = np.stack([np.asarray(texts[value]) for value in self.classes_.tolist()])
        given = torch.as_tensor(np.asarray(texts, dtype=np.float64)).float()
        if given.shape != shape:
            raise ValueError(
                f"text_features must be [K, D] = {list(shape)}, got {list(given.shape)}"
            )
        return given

    def _fit(self, records: Records, train: int) -> None:
        every, empty = torch.arange(len(records)), torch.arange(0)
        split = Split(every[:train], every[train:], empty, "")
        shots = max(1, statistics.median_low(records.label[:train].bincount().tolist()))
        run = TrainingRun(CPU, self.seed, balanced=True)
        with torch.random.fork_rng(devices=[]):
            if self.method == "auto":
                recipe_config("auto", shots, self.overrides)
                fitted: Head = fit_auto(records, split, shots, run)[0]
            else:
                config = recipe_config(self.method, shots, self.overrides)
                fitted = fit_head(
                    self.method, records, split, config, run, choose=False, solve=not len(split.val)
                )
                choose_by(fitted, records, split.val, CPU)
        self.head_, self.temperature_ = fitted, 1.0
        if len(split.val):
            said = decide(fitted, TrainingRows(records, split.val), split.val, CPU)
            self.temperature_ = metrics.fit_temperature(said.logits, said.label)

    def decision_function(self, X: Any) -> Array:
        """Logits of X [B, D]: [B, K] float64; of two classes the second's minus the first's [B]."""
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def predict_proba(self, X: Any) -> Array:
        """Probabilities of X [B, D]: [B, K] float64, softmax(logits / temperature_)."""
        logits = torch.from_numpy(self._logits(X))
        said: Array = (logits / self.temperature_).softmax(dim=1).numpy()
        return said

    def predict(self, X: Any) -> Array:
        """The most probable class of each row of X [B, D]: [B], of `classes_`."""
        best = self._logits(X).argmax(axis=1)
        found: Array = self.classes_[best]
        return found

    @torch.no_grad()
    def _logits(self, X: Any) -> Array:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        head = copy.deepcopy(self.head_).double().eval()
        logits: Array = head(F.normalize(_rows(X).double(), dim=-1)).numpy()
        return logits


def _rows(X: Array) -> Tensor:
    """Rows [N, D] float32; a row of zeros, which has no direction, is refused."""
    rows = torch.from_numpy(X).float()
    zeros = (~rows.any(dim=1)).nonzero().flatten().tolist()
    if zeros:
        raise ValueError(
            f"features: X must hold no row of zeros, got {len(zeros)}, first {zeros[0]}"
        )
    if not bool(rows.isfinite().all()):
        raise ValueError(f"features: X must be finite in float32, got {np.abs(X).max():g}")
    return rows

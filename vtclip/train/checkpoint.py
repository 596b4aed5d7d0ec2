# SPDX-License-Identifier: Apache-2.0
"""The state of a running fit, in one safetensors file: weights, optimizer, random state, step.

The file carries what the run is (`identity`) and a digest of its tensors and of all that it says of
them; another run's file, a cut file and a flipped bit are refused. Nothing in it is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from vtclip.files import (
    Json,
    parse_json,
    read_safetensors,
    safetensors_digest,
    to_json,
    write_atomic,
)
from vtclip.schemas import check, obj, table, text, whole

WHAT = "a vtclip checkpoint"
FORMAT_VERSION = 2  # from which on the digest is of the state, too
_STATE = table({"format_version?": whole(1), "step": whole(), "loss_sum": text, "identity": obj})


class Checkpoint:
    """Saves and restores one fit at `path`; `identity` is what must be equal to go on with it."""

    def __init__(self, path: Path, identity: Mapping[str, object]) -> None:
        self.path = path
        self.identity: Json = json.loads(to_json(identity))

    def save(
        self, head: nn.Module, optimizer: torch.optim.Optimizer, step: int, loss_sum: float
    ) -> None:
        tensors = {f"head.{name}": value for name, value in head.state_dict().items()}
        for number, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{number}.{name}"] = value
        tensors["random.cpu"] = torch.get_rng_state()
        if any(value.is_cuda for value in tensors.values()):
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        # clones: a view would drag its whole storage into the file
        dense = torch.contiguous_format
        tensors = {
            name: value.detach().cpu().clone(memory_format=dense) for name, value in tensors.items()
        }
        state_json = {"format_version": FORMAT_VERSION, "step": step, "loss_sum": loss_sum.hex()}
        metadata = {"state": to_json({**state_json, "identity": self.identity}).decode()}
        metadata["digest"] = safetensors_digest(tensors, metadata)
        write_atomic(self.path, save_bytes(tensors, metadata))

    def load(self, head: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
        """Restore the saved state; returns the steps done and the epoch's sum of losses so far."""
        tensors, state_json, loss_sum = self._read()
        for name, wanted in self.identity.items():
            if state_json["identity"].get(name) != wanted:
                raise ValueError(
                    f"cannot resume from {self.path}: {name} was "
                    f"{shortened(state_json['identity'].get(name))}, now it is {shortened(wanted)}"
                )
        groups: dict[str, dict[str, Tensor]] = {"head": {}, "optimizer": {}, "random": {}}
        for name, value in tensors.items():
            group, _, rest = name.partition(".")
            if group not in groups:
                raise ValueError(f"not {WHAT}: {self.path} holds a tensor {name}")
            groups[group][rest] = value
        shapes = {name: value.shape for name, value in head.state_dict().items()}
        for name in sorted(shapes.keys() | groups["head"].keys()):
            saved = groups["head"].get(name)
            if saved is None or saved.shape != shapes.get(name):
                fact = f"{name} differs between the checkpoint and the head of this version"
                raise ValueError(f"cannot resume from {self.path}: {fact}")
        head.load_state_dict(groups["head"])
        try:
            optimizer.load_state_dict(_optimizer_state(groups["optimizer"], optimizer))
            torch.set_rng_state(groups["random"]["cpu"])
            if "cuda" in groups["random"]:
                torch.cuda.set_rng_state(groups["random"]["cuda"])
        except (ValueError, LookupError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ValueError(f"cannot resume from {self.path}: {reason}") from None
        return int(state_json["step"]), loss_sum

    def _read(self) -> tuple[dict[str, Tensor], Json, float]:
        """The checked tensors, what is said of them, and the sum of losses."""
        tensors, metadata = read_safetensors(self.path, WHAT, older=_is_older)
        try:
            state_json = parse_json(metadata.get("state", ""))
            check(state_json, _STATE, "its state")
            loss_sum = float.fromhex(state_json["loss_sum"])
        except (ValueError, OverflowError) as error:
            raise ValueError(f"not {WHAT}: {self.path}: {error}") from None
        version = state_json.get("format_version", 1)
        if version > FORMAT_VERSION:
            raise ValueError(
                f"not {WHAT}: {self.path} has format version {version}, this vtclip reads up to "
                f"{FORMAT_VERSION}"
            )
        return tensors, state_json, loss_sum


def _is_older(metadata: Mapping[str, str]) -> bool:
    return "format_version" not in metadata.get("state", "")


def _optimizer_state(tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Json:
    """What `load_state_dict` takes: moments by the number of their parameter and their name."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, rest = name.partition(".")
        if not number.isdecimal() or int(number) >= len(parameters):
            raise ValueError(f"optimizer.{name} belongs to no weight of the head of this version")
        if value.dim() and value.shape != parameters[int(number)].shape:
            raise ValueError(f"optimizer.{name} does not have the shape of its weight")
        state.setdefault(int(number), {})[rest] = value
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def shortened(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."

# SPDX-License-Identifier: Apache-2.0
"""The state of a running fit, in one safetensors file: weights, optimizer, random state, step.

The file carries what the run is (`identity`) and a digest of its tensors; another run's file, a cut
file and a flipped bit are refused. Nothing in it is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from vtclip.files import Json, read_safetensors, tensors_digest, to_json, write_atomic


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
        tensors = {name: value.detach().cpu().clone() for name, value in tensors.items()}
        state_json = {"step": step, "loss_sum": loss_sum.hex(), "identity": self.identity}
        metadata = {"state": to_json(state_json).decode(), "digest": tensors_digest(tensors)}
        write_atomic(self.path, save_bytes(tensors, metadata))

    def load(self, head: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
        """Restore the saved state; returns the steps done and the epoch's sum of losses so far."""
        tensors, metadata = read_safetensors(self.path, "a vtclip checkpoint")
        state_json = json.loads(metadata["state"])
        for name, wanted in self.identity.items():
            if state_json["identity"].get(name) != wanted:
                raise ValueError(
                    f"cannot resume from {self.path}: {name} was "
                    f"{shortened(state_json['identity'].get(name))}, now it is {shortened(wanted)}"
                )
        groups: dict[str, dict[str, Tensor]] = {"head": {}, "optimizer": {}, "random": {}}
        for name, value in tensors.items():
            group, _, rest = name.partition(".")
            groups[group][rest] = value
        shapes = {name: value.shape for name, value in head.state_dict().items()}
        for name in sorted(shapes.keys() | groups["head"].keys()):
            saved = groups["head"].get(name)
            if saved is None or saved.shape != shapes.get(name):
                fact = f"{name} differs between the checkpoint and the head of this version"
                raise ValueError(f"cannot resume from {self.path}: {fact}")
        head.load_state_dict(groups["head"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in groups["optimizer"].items():
            number, _, rest = name.partition(".")
            state.setdefault(int(number), {})[rest] = value
        optimizer.load_state_dict(
            {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
        )
        torch.set_rng_state(groups["random"]["cpu"])
        if "cuda" in groups["random"]:
            torch.cuda.set_rng_state(groups["random"]["cuda"])
        return int(state_json["step"]), float.fromhex(state_json["loss_sum"])


def shortened(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."

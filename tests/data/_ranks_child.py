# SPDX-License-Identifier: Apache-2.0
"""Features extracted by two processes of which one may misbehave; prints every outcome.

    python _ranks_child.py FOLDER

The processes are forked from this one, so that torch is imported once for all.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from fake_clip import FakeClip
from pictures import noise

from vtclip import distributed
from vtclip.data import shards
from vtclip.data.extract import extract_features
from vtclip.data.records import Records
from vtclip.distributed import joined
from vtclip.heads import ZeroShot
from vtclip.train.engine import head_metrics

LIMIT_S = 60.0
root = Path(sys.argv[1])
shards.SHARD_ROWS = 3
torch.set_num_threads(1)


def counted(records: Records) -> list[float]:
    """How many images an evaluation counts, and its accuracy and likelihood to the last bit."""
    head = ZeroShot(records.text, logit_scale=records.logit_scale)
    index = torch.arange(len(records))
    values = head_metrics(head, records, index, device=torch.device("cpu"))
    return [values["count"], values["accuracy"], values["nll"]]


def rank(number: int, size: int, port: int, how: str, out: Path) -> NoReturn:
    """One process; never returns."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["LOCAL_WORLD_SIZE"] = str(size)
    source = root / ("other" if how == "differ" and number else "pictures")
    source = root / "few" if how == "few" else source
    clip = FakeClip(poison=how == "poison" and number == 1)
    encode, last = clip.encode_image, number == size - 1

    def misbehave(pixels: torch.Tensor, spatial: Any = None) -> Any:
        if how == "kill" and last and clip.images_encoded >= 4:  # in its second shard
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "slow" and number == 0:
            time.sleep(0.05)
        return encode(pixels, spatial)

    clip.encode_image = misbehave
    outcome: dict[str, Any] = {"error": None}
    if how == "patient":
        distributed.STEP_TIMEOUT = timedelta(seconds=4)
    try:
        with joined(torch.device("cpu")) as world:
            if how == "patient":  # what the first does alone takes longer than a step may
                world.by_first(lambda: time.sleep(5))
            features, report = extract_features(
                source, out, model=clip, spatial="raw", batch_size=2, progress=False, world=world
            )
        outcome |= {"rows": len(features), "reused": report.reused, "skipped": report.skipped}
        outcome["counted"] = counted(features.records())
    except Exception as error:
        outcome["error"] = f"{type(error).__name__}: {error}"
    outcome["encoded"] = clip.images_encoded
    (root / f"{out.name}-{how}.{number}").write_text(json.dumps(outcome))
    os._exit(0 if outcome["error"] is None else 1)


def together(how: str, out: Path, size: int = 2) -> dict[str, Any]:
    """`size` processes at once, and what `out` holds when all have ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for number in range(size):
        child = os.fork()
        if child == 0:
            rank(number, size, port, how, out)
        children.append(child)
    started, codes = time.monotonic(), []
    for child in children:
        ended = 0
        while not ended and time.monotonic() < started + LIMIT_S:
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.01)
        if not ended:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        codes.append(os.waitstatus_to_exitcode(status))
    places = [root / f"{out.name}-{how}.{number}" for number in range(size)]
    outcomes = [json.loads(path.read_text()) if path.exists() else None for path in places]
    return {
        "codes": codes,
        "processes": outcomes,
        "files": sorted(path.name for path in out.glob("*")),
        "same": files(out) == (whole_few if how == "few" else whole),
    }


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*")}


folder = noise(root / "pictures", each=7)
(folder / "dog" / "3.png").write_bytes(b"no image")  # its row is in nobody's shard
noise(root / "other", each=6)
noise(root / "few", each=1)


def alone(source: Path, out: Path) -> Records:
    """The features that one process makes."""
    found, _ = extract_features(
        source, out, model=FakeClip(), spatial="raw", batch_size=2, progress=False
    )
    return found.records()


one = alone(folder, root / "whole")
whole = files(root / "whole")
alone(root / "few", root / "whole few")
whole_few = files(root / "whole few")
outcomes = {
    "one": {"counted": counted(one)},
    "two": together("fine", root / "two"),
    "three": together("fine", root / "three", 3),
    "five": together("fine", root / "five", 5),
    "few": together("few", root / "fewer", 5),
    "patient": together("patient", root / "patient"),
    "slow": together("slow", root / "slow"),
    "killed": together("kill", root / "killed"),
    "again": together("fine", root / "killed"),
    "reused": together("fine", root / "two"),
    "poison": together("poison", root / "poison"),
    "differ": together("differ", root / "differ"),
}
sys.stdout.write(json.dumps(outcomes))

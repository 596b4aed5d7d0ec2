# SPDX-License-Identifier: Apache-2.0
"""Fits of two processes in which rank 1 misbehaves; prints what came of each.

    python _finetune_child.py SOURCE MODEL OUT CACHE

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

import open_clip  # noqa: F401
import torch

from vtclip import distributed
from vtclip.cli import main
from vtclip.runs import fit_encoders  # noqa: F401
from vtclip.train import finetune

source, model, out, cache = sys.argv[1:]
LIMIT_S = 60.0
WORDS = ["fit", source, "--method", "rada", "--train-encoders", "--model", model, "--shots", "4"]
WORDS += ["--epochs", "4", "--batch-size", "6", "--templates", "a photo of a {}."]
WORDS += ["--device", "cpu", "--cache-dir", cache]
drawn = finetune.drawn_templates


def rank(number: int, how: str, port: int) -> NoReturn:
    """One process; never returns."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if how == "stall":
        distributed.STEP_TIMEOUT = timedelta(seconds=3)

    def misbehave(count: int, classes: int, seed: int, step: int) -> Any:
        if step == 2 and number == 1:
            if how == "raise":
                raise ValueError("a broken image")
            if how == "exit":
                os._exit(0)
            if how == "stall":
                time.sleep(LIMIT_S)
            if how == "sigterm":
                os.kill(os.getpid(), signal.SIGTERM)
        return drawn(count, classes, seed, step)

    finetune.drawn_templates = misbehave
    error = os.open(f"{out}/{how}.{number}", os.O_WRONLY | os.O_CREAT)
    os.dup2(error, 2)
    try:
        seed = number if how == "differ" else 1
        code = main([*WORDS, "--seed", str(seed), "--out", f"{out}/{how}"])
    except SystemExit as done:
        code = int(done.code or 0)
    except BaseException as failed:
        sys.stderr.write(f"{type(failed).__name__}: {failed}\n")
        code = 70
    sys.stderr.flush()
    os._exit(code)


def outcome(how: str) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for number in range(2):
        child = os.fork()
        if child == 0:
            rank(number, how, port)
        children.append(child)
    started, status = time.monotonic(), 0
    while time.monotonic() < started + LIMIT_S:
        ended, status = os.waitpid(children[0], os.WNOHANG)
        if ended:
            break
        time.sleep(0.05)
    seconds = time.monotonic() - started
    for child in children if seconds >= LIMIT_S else children[1:]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    stderr = [Path(f"{out}/{how}.{number}").read_text() for number in range(2)]
    code = os.waitstatus_to_exitcode(status) if seconds < LIMIT_S else None
    files = sorted(path.name for path in Path(out, how).glob("*"))
    return {"code": code, "seconds": seconds, "stderr": stderr, "files": files}


WAYS = ("raise", "exit", "stall", "sigterm", "differ")
sys.stdout.write(json.dumps({how: outcome(how) for how in WAYS}))

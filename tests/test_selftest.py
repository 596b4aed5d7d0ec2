# SPDX-License-Identifier: Apache-2.0
"""`vtclip selftest` over kernels that are wrong, crash, raise and hang; who reads its record."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch

from vtclip import info, ops
from vtclip.backends import native, record
from vtclip.cli import main
from vtclip.ops._select import Problem, select
from vtclip.runs import proven
from vtclip.testing import selftest, selftest_worker

needs_kernels = pytest.mark.skipif(bool(native.load_cpu()), reason="the CPU kernels are not built")
CPU = torch.device("cpu")
# a worker whose CPU kernels are broken in four ways
BROKEN = """
import os, signal, sys, time
import torch
from vtclip.backends import native
from vtclip.testing import selftest_worker

whole = native.CPU.function

def function(name):
    def broken(*arguments):
        dtype = arguments[0].dtype
        if (name, dtype) == ("cosine_logits_fwd", torch.float32):
            os.kill(os.getpid(), signal.SIGSEGV)
        if (name, dtype) == ("cosine_logits_fwd", torch.float64):
            raise RuntimeError("no kernel image\\nis available")
        if (name, dtype) == ("rational_logits_fwd", torch.float16):
            time.sleep(600)
        results = whole(name)(*arguments)
        if name == "unit_products_bwd" and dtype in (torch.float32, torch.bfloat16):
            results = results[0], results[1] * 1.1
        return results
    return broken

native.CPU.function = function
sys.exit(selftest_worker.main(sys.argv[1:]))
"""
TESTED = ("unit_products", "cosine_logits", "rational_logits")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of this test alone; what selection has read is read again."""
    monkeypatch.setenv("VTCLIP_CACHE", str(tmp_path / "cache"))
    record.forget()
    yield tmp_path / "cache"
    record.forget()


def row(op: str, impl: str, dtype: str, status: str = record.RIGHT, reason: str = "") -> dict:
    return {"op": op, "impl": impl, "dtype": dtype, "status": status, "reason": reason}


def kept(*rows: dict) -> Path:
    return record.write(CPU, rows)


@needs_kernels
def test_broken_kernels_are_named_and_left_out(cache, tmp_path, monkeypatch, capsys):
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    monkeypatch.setattr(selftest, "WORKER", (sys.executable, str(script)))
    monkeypatch.setattr(selftest, "OPS", dict.fromkeys(TESTED))
    monkeypatch.setattr(selftest, "ITEM_S", 10.0)
    found = tmp_path / "found.json"
    assert main(["selftest", "--device", "cpu", "--impl", "cpu", "--json", str(found)]) == 1
    page, said = capsys.readouterr()
    rows = {record.key(row): row for row in json.loads(found.read_text())["rows"]}
    assert len(rows) == 12
    bad = {key: row for key, row in rows.items() if row["status"] != record.RIGHT}
    told = {(op, dtype): (row["status"], row["reason"]) for (op, _, dtype), row in bad.items()}
    assert told[("cosine_logits", "float32")] == ("failed", "its process ended with SIGSEGV")
    assert told[("cosine_logits", "float64")] == ("failed", "RuntimeError: no kernel image")
    assert told[("rational_logits", "float16")] == ("failed", "did not end within 10 s")
    for dtype in ("float32", "bfloat16"):
        status, reason = told[("unit_products", dtype)]
        assert status == "wrong", reason
        assert reason.startswith("unit_products, ")
        assert "gradient 1: error" in reason
        part = rows["unit_products", "cpu", dtype]["backward"]
        assert part["error"] > part["budget"] > 0
    assert len(bad) == 5
    assert "7 right, 2 wrong, 3 failed, 0 not available" in page
    assert page.count("WRONG") == 2
    assert "5 of 12 kernels wrong or failed, left out" in said

    # selection passes over what failed, and says why where it is asked for by name
    image, text = torch.randn(2, 8), torch.randn(3, 8)
    assert select(Problem("cosine_logits", "cpu", torch.float32, 8), None).name == "reference"
    assert select(Problem("cosine_logits", "cpu", torch.bfloat16, 8), None).name == "cpu"
    ops.cosine_logits(image, text)
    with pytest.raises(NotImplementedError, match=r"SIGSEGV \(vtclip selftest, .*\.json\)"):
        ops.cosine_logits(image, text, impl="cpu")
    with record.ignored():
        ops.cosine_logits(image, text, impl="cpu")
    assert "SIGSEGV" in info.render(info.report())


def test_a_good_device_is_proven_and_a_record_of_another_version_is_not_used(cache, monkeypatch):
    assert record.standing(CPU).kind == "unproven"
    path = kept(row("cosine_logits", "cpu", "float32"))
    assert record.standing(CPU).kind == "partial"
    assert "reference not tested" in record.standing(CPU).line
    assert kept(row("cosine_logits", "reference", "float32")) == path
    standing = record.standing(CPU)
    assert standing.kind == "proven"
    assert "proven: 2 kernels right" in standing.line
    assert str(path) in standing.line
    kept(row("cosine_logits", "cpu", "float32", record.WRONG, "off"))
    problem = Problem("cosine_logits", "cpu", torch.float32, 8)
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    record.forget()
    standing = record.standing(CPU)
    assert standing.kind == "stale"
    assert ", here 9.9.9; run vtclip selftest" in standing.line
    assert not record.why_failed("cosine_logits", "cpu", "cpu", torch.float32)
    if not native.load_cpu():
        assert select(problem, None).name == "cpu"


def test_the_reference_is_never_left_out(cache):
    kept(
        *(
            row("cosine_logits", impl, "float32", record.WRONG, "off")
            for impl in record.IMPLS["cpu"]
        )
    )
    assert select(Problem("cosine_logits", "cpu", torch.float32, 8), None).name == "reference"
    assert record.standing(CPU).kind == "failed"


@pytest.mark.parametrize("damage", ["{", '{"format": "vtclip self-test", "version": 1}'])
def test_a_damaged_record_is_said_and_not_used(cache, damage):
    path = kept(row("cosine_logits", "cpu", "float32", record.WRONG, "off"))
    path.write_text(damage)
    record.forget()
    assert record.standing(CPU).kind == "damaged"
    assert not record.why_failed("cosine_logits", "cpu", "cpu", torch.float32)
    assert kept(row("cosine_logits", "cpu", "float32")) == path
    assert record.standing(CPU).kind == "partial"


@needs_kernels
def test_a_choice_that_a_record_made_is_traced_whole(cache):
    kept(row("cosine_logits", "cpu", "float32", record.WRONG, "off"))

    @torch.compile(backend="eager", fullgraph=True)
    def logits(image, text):
        return ops.cosine_logits(image, text, scale=2.0)

    image, text = torch.randn(2, 8), torch.randn(3, 8)
    expected = ops.cosine_logits(image, text, scale=2.0, impl="reference")
    torch.testing.assert_close(logits(image, text), expected)


@pytest.mark.parametrize("kind", ["unproven", "failed", "proven"])
def test_the_first_fit_on_a_gpu_says_so_in_one_line(kind, monkeypatch, caplog):
    monkeypatch.setattr(proven, "_said", set())
    monkeypatch.setattr(record, "standing", lambda device: record.Standing(kind, f"GPU: {kind}"))
    with caplog.at_level(logging.WARNING):
        for device in ("cpu", "cuda", "cuda"):
            proven.say_unless_proven(torch.device(device))
    assert [r.getMessage() for r in caplog.records] == [f"GPU: {kind}"] * (kind != "proven")


def test_every_operator_and_its_functions_are_cases():
    names = {case.name.split(",")[0] for op in selftest.OPS for case in selftest_worker.cases(op)}
    assert names == {name for name in ops.__all__ if name.islower()}
    assert {case.name for case in selftest_worker.cases("cosine_logits")} == {
        f"cosine_logits{variant}, {size}"
        for variant in ("", ", text per image") for size in ("odd", "even")
    }  # fmt: skip


def test_what_cannot_run_is_not_available_with_its_reason():
    row = selftest_worker.tested("cosine_logits", "cuda", "float32", "cpu")
    assert row["status"] == record.UNAVAILABLE
    assert row["reason"] == "needs cuda tensors, got cpu"
    page = selftest.table([row])
    assert "not available: cuda: needs cuda tensors, got cpu (1 of 1)" in page


def test_a_worker_that_cannot_start_fails_everything_once(monkeypatch):
    monkeypatch.setattr(selftest, "WORKER", (sys.executable, "-c", "raise SystemExit('no GPU')"))
    monkeypatch.setattr(selftest, "OPS", dict.fromkeys(TESTED))
    rows = selftest.run("cpu", ("cpu",))
    assert {row["status"] for row in rows} == {record.FAILED}
    assert {row["reason"] for row in rows} == {"its process ended with exit code 1: no GPU"}
    assert len(rows) == 12


def test_a_driver_is_read_from_its_module(tmp_path, monkeypatch):
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
    (tmp_path / "version").write_text(line)
    monkeypatch.setattr(record, "DRIVER", tmp_path / "version")
    assert record._driver() == "580.65.06"

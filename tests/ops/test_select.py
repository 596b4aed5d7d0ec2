# SPDX-License-Identifier: Apache-2.0
"""Selection: order, reasons, explicit requests, unknown names; and the errors of every argument."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vtclip import ops
from vtclip.backends import native, triton
from vtclip.ops._select import Problem, explain, only_reference, select
from vtclip.testing.problems import FUNCTIONS, OPS

CPU_PROBLEM = Problem("cross_attn", "cpu", torch.float32, 64)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="impl must be None or one of 'cpu', 'triton', 'cuda', 'r"):
        select(CPU_PROBLEM, "cudnn")  # type: ignore[arg-type]


def test_a_named_implementation_never_falls_back():
    with pytest.raises(NotImplementedError, match=r"cuda: needs cuda tensors, got cpu"):
        select(CPU_PROBLEM, "cuda")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_selection_is_told_the_width_of_rows_or_of_a_head(name, monkeypatch):
    sizes = {"B": 2, "K": 3, "H": 4, "L": 5, "d": 6, "D": 7, "C": 7, "F": 9}
    told: list[Problem] = []

    def chosen(problem: Problem, impl: str | None) -> object:
        told.append(problem)
        return select(problem, impl)

    for module in [m for n, m in sys.modules.items() if n.startswith("vtclip.ops.")]:
        if getattr(module, "select", None) is select and not module.__name__.endswith("_select"):
            monkeypatch.setattr(module, "select", chosen)
    call = FUNCTIONS[name]
    call(*call.draw(sizes))
    attention = "H" in call.op.sizes and call.op.name != "rational_head"
    assert {problem.width for problem in told} == {sizes["d" if attention else "D"]}


def test_refusal_names_op_dtype_width_and_every_reason(monkeypatch):
    monkeypatch.setattr(native, "load_cpu", lambda: "the extension is not there")
    with pytest.raises(
        NotImplementedError, match=r"^cross_attn: .*float32 of width 64 on cpu \(cpu: the ext"
    ):
        select(CPU_PROBLEM, "cpu")


def test_first_without_reasons_is_taken(monkeypatch):
    monkeypatch.setattr(native, "load_cpu", lambda: "gone")
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    assert select(CPU_PROBLEM, None).name == "reference"


def test_the_interpreter_runs_only_when_named(monkeypatch):
    monkeypatch.setattr(native, "load_cpu", lambda: "gone")
    monkeypatch.setattr(triton, "interpreted", lambda: True)
    monkeypatch.setattr(triton, "load", lambda: "")
    assert select(CPU_PROBLEM, None).name == "reference"
    assert select(CPU_PROBLEM, "triton").name == "triton"


def test_only_the_reference_runs_in_the_thread_that_asked_for_it(monkeypatch):
    monkeypatch.setattr(native, "load_cpu", lambda: "")
    monkeypatch.setattr(native, "_has_kernel", lambda op, key: True)
    assert select(CPU_PROBLEM, None).name == "cpu"
    with ThreadPoolExecutor(1) as other_thread:
        with only_reference():
            assert select(CPU_PROBLEM, None).name == "reference"
            assert other_thread.submit(select, CPU_PROBLEM, None).result().name == "cpu"
            with only_reference():
                pass
            assert select(CPU_PROBLEM, None).name == "reference"
        assert select(CPU_PROBLEM, None).name == "cpu"


def test_wide_heads_go_to_the_reference_with_the_limit_as_reason():
    problem = Problem("cross_attn", "cpu", torch.float32, 257)
    reasons = dict(explain(problem))
    assert any("257 is above 256" in reason for reason in reasons["cpu"])
    assert select(problem, None).name == "reference"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_float64_on_a_gpu_goes_to_the_reference_with_the_dtype_as_reason(monkeypatch, op, impl):
    monkeypatch.setattr(native, "load_cuda", lambda: "")
    monkeypatch.setattr(native, "_has_kernel", lambda op, key: True)
    monkeypatch.setattr(triton, "load", lambda: "")
    problem = Problem(op, "cuda", torch.float64, 64)
    assert dict(explain(problem))[impl] == ("has no float64 kernel",)
    assert select(problem, None).name == "reference"
    assert dict(explain(problem._replace(dtype=torch.float32)))["cuda"] == ()


@pytest.mark.parametrize(
    ("arches", "runs", "not_on"),
    [
        ("9.0+PTX", [(9, 0), (10, 0), (12, 1)], [(7, 5), (8, 0), (8, 9)]),
        ("8.0;9.0", [(8, 0), (8, 6), (8, 9), (9, 0)], [(7, 5), (10, 0), (12, 0)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("", [(9, 0)], []),
        ("Hopper", [(9, 0)], []),
    ],
)
def test_a_gpu_the_library_was_not_compiled_for_is_a_reason(monkeypatch, arches, runs, not_on):
    monkeypatch.setattr(native, "load_cuda", lambda: "")
    monkeypatch.setattr(native, "_has_kernel", lambda op, key: True)
    monkeypatch.setattr(native, "build_info", lambda: {"arches": arches})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    problem = Problem("cross_attn", "cuda", torch.float32, 64)
    gpus = [*runs, *not_on]  # all in one machine
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpus[device])
    native._no_code_for.cache_clear()
    for device, capability in enumerate(gpus):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        (reason,) = native.CUDA.why_not(problem) or ("",)
        name = "{}.{}".format(*capability)
        told = f"was compiled for {arches}, this GPU is {name} (TORCH_CUDA_ARCH_LIST)"
        assert reason == (told if capability in not_on else "")
    native._no_code_for.cache_clear()


def test_broken_extension_is_a_reason_with_its_cause(monkeypatch):
    def fail(name: str) -> None:
        raise OSError(f"{name}: undefined symbol: _ZN3c10")

    native.load_cpu.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(native.importlib.util, "find_spec", lambda name: object())
        patched.setattr(native.importlib, "import_module", fail)
        reason = native.load_cpu()
    native.load_cpu.cache_clear()
    assert "undefined symbol" in reason
    assert torch.__version__ in reason


@pytest.mark.parametrize("content", [None, b"", b"not a library"])
def test_a_library_that_is_none_is_a_reason_with_its_file(monkeypatch, tmp_path, content):
    path = tmp_path / "_C_cuda.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(native, "cuda_library", lambda: path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    native.load_cuda.cache_clear()
    reason = native.load_cuda()
    native.load_cuda.cache_clear()
    assert reason.startswith(f"_C_cuda.so failed to load with torch {torch.__version__}: ")
    assert "\n" not in reason


def four(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


BAD = {
    "key not a tensor": (
        lambda: ops.cross_attn(four(1, 2, 3, 4), [1], four(1, 2, 5, 4)),  # type: ignore[arg-type]
        TypeError,
        "cross_attn: key must be a Tensor, got list",
    ),
    "integer query": (
        lambda: ops.cross_attn(
            four(1, 2, 3, 4, dtype=torch.int64), four(1, 2, 5, 4), four(1, 2, 5, 4)
        ),
        TypeError,
        "query must be one of float16, bfloat16, float32, float64, got int64",
    ),
    "complex value": (
        lambda: ops.cross_attn(
            four(1, 2, 3, 4), four(1, 2, 5, 4), four(1, 2, 5, 4, dtype=torch.complex64)
        ),
        TypeError,
        "value must be one of .* got complex64",
    ),
    "sparse image": (
        lambda: ops.cosine_logits(four(2, 3).to_sparse(), four(4, 3)),
        TypeError,
        "image must be a dense tensor, got layout torch.sparse_coo",
    ),
    "other device": (
        lambda: ops.cosine_logits(four(2, 3), four(4, 3).to("meta")),
        ValueError,
        "text must be on cpu like image, got meta",
    ),
    "rank": (
        lambda: ops.cross_attn(four(2, 3, 4), four(1, 2, 5, 4), four(1, 2, 5, 4)),
        ValueError,
        r"query must have 4 dimensions \[B\|1, H, K, d\], got \[2, 3, 4\]; "
        r"unsqueeze\(1\) for one head",
    ),
    "key width": (
        lambda: ops.cross_attn(four(1, 2, 3, 4), four(6, 2, 5, 8), four(6, 2, 5, 4)),
        ValueError,
        r"key must be \[B\|1, H, L, d\] = \[6\|1, 2, 5, 4\], got \[6, 2, 5, 8\]",
    ),
    "two batches": (
        lambda: ops.cross_attn(four(2, 2, 3, 4), four(3, 2, 5, 4), four(3, 2, 5, 4)),
        ValueError,
        r"= \[3\|1, 2, 3, 4\], got \[2, 2, 3, 4\]|= \[2\|1, 2, 5, 4\], got \[3, 2, 5, 4\]",
    ),
    "mask length": (
        lambda: ops.cross_attn(
            four(1, 2, 3, 4),
            four(1, 2, 5, 4),
            four(1, 2, 5, 4),
            key_mask=torch.ones(1, 4, dtype=torch.bool),
        ),
        ValueError,
        r"key_mask must be \[B\|1, L\] = \[1\|1, 5\], got \[1, 4\]",
    ),
    "mask dtype": (
        lambda: ops.cross_attn_weights(
            four(1, 2, 3, 4), four(1, 2, 5, 4), key_mask=torch.ones(1, 5)
        ),
        TypeError,
        "key_mask must be bool",
    ),
    "scale tensor": (
        lambda: ops.cosine_logits(four(2, 3), four(4, 3), scale=torch.ones(())),  # type: ignore[arg-type]
        TypeError,
        "cosine_logits: scale must be a float, got Tensor",
    ),
    "scale nan": (
        lambda: ops.cosine_logits(four(2, 3), four(4, 3), scale=float("nan")),
        ValueError,
        "scale must be finite, got nan",
    ),
    "widths differ": (
        lambda: ops.cosine_logits(four(2, 3), four(4, 5)),
        ValueError,
        r"text must be \[K, D\] = \[4, 3\], got \[4, 5\]",
    ),
    "negative eps": (
        lambda: ops.norm_cosine_logits(
            four(1, 2, 3), four(3), four(3), four(2, 3), four(1, 3), eps=-1.0
        ),
        ValueError,
        "eps must be at least 0, got -1.0",
    ),
    "hidden classes": (
        lambda: ops.norm_cosine_logits(four(1, 5, 3), four(3), four(3), four(2, 3), four(1, 3)),
        ValueError,
        r"text must be \[K, C\] = \[5, 3\], got \[2, 3\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named_in_one_line(case):
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)

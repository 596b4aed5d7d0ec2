# SPDX-License-Identifier: Apache-2.0
"""The stand-ins: exact bounds, unwritten bytes, the host's own checks, Triton's specialisation."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from harness import child
from harness.build import missing, replaced
from harness.coverage import summary
from harness.host import entries
from op_budget import out_of_budget


def run(code: str) -> str:
    """What a program prints that runs with the stand-in preloaded."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=child.environment(),
        cwd=child.HERE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def cuda() -> None:
    if reason := missing("cuda"):
        pytest.skip(reason)


@pytest.fixture
def triton() -> None:
    if reason := missing("triton"):
        pytest.skip(reason)


def test_blocks_have_exact_bounds_and_know_what_was_written(triton) -> None:
    printed = run("""
        import torch
        from harness.host import Recorder, Standin, _written
        standin = Standin()
        old = torch.zeros(5)
        recorder = Recorder(standin)
        with recorder.call():
            new = torch.empty(7)
            new[:2] = 1.0
            recorder._refresh()
            sizes = {address: size for address, size in standin.blocks().values()}
            print(sizes[old.data_ptr()], sizes[new.data_ptr()])
            memory = recorder._memory
            print(memory.is_initialised(old.data_ptr(), 20))
            print(memory.is_initialised(new.data_ptr(), 8))
            print(memory.is_initialised(new.data_ptr(), 28))
        at = new.data_ptr()
        del new
        print(at in {address for address, _ in standin.blocks().values()})
    """)
    assert printed.split() == ["20", "28", "True", "True", "False", "False"]


def test_threads_may_build_one_file_at_once(tmp_path) -> None:
    """Each set runs in a thread of its own, and all need the stand-in first."""
    path = tmp_path / "built.txt"
    slow = ("sh", "-c", 'sleep 0.2; echo built > "$1"')  # called with -o PATH
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: replaced(path, *slow), range(4)))
    assert found == [path] * 4
    assert path.read_text("ascii") == "built\n"
    assert list(tmp_path.iterdir()) == [path]


CUDA = """
    import torch
    from harness import child
    backend = child.opened("cuda", "sm_90")
    forward = backend.function("rational_logits_fwd")
    image, text, mask = torch.ones(2, 8), torch.ones(3, 8), torch.zeros(2, 3, 8)
"""


def test_the_shipped_host_code_checks_its_arguments(cuda) -> None:
    printed = run(
        CUDA
        + """
    try:
        forward(image, text[:2], mask, 1.0)
    except RuntimeError as error:
        print(str(error).splitlines()[0])
    print(forward(image, text, mask, 1.0).tolist())
    """
    )
    message, result = printed.splitlines()
    assert "rational_logits_fwd: text" in message
    assert json.loads(result) == [[8.0] * 3] * 2


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        # nothing is stored: the output keeps its poison
        ("lambda line: '' if 'st.global' in line else line", "nan"),
        # every load reads behind its tensor
        ("lambda line: line.replace(']', '+4096]') if 'ld.global' in line else line", "bounds"),
    ],
)
def test_damage_shows(change: str, kind: str, cuda) -> None:
    printed = run(
        CUDA
        + f"""
    change = {change}
    backend.recorder.edit = lambda key, text: "\\n".join(map(change, text.split("\\n")))
    print("nan" if forward(image, text, mask, 1.0).isnan().any() else "numbers")
    print(*(f.kind for launch in backend.recorder.launches for f in launch.report.findings))
    """
    )
    assert kind in printed


def test_a_launch_beyond_the_device_is_refused(cuda) -> None:
    printed = run("""
        import ctypes
        from harness.host import Standin
        host = Standin().library
        print(host.cudaFuncSetAttribute(ctypes.c_void_p(1), 8, 0), host.cudaGetLastError())
    """)
    assert printed.split() == ["98", "98"]


def test_triton_specialises_as_at_run_time(triton) -> None:
    """16-byte alignment and a size of 1 are told to the compiler: three variants."""
    printed = run("""
        import torch
        from harness import child
        backend = child.opened("triton", "sm_80")
        sums = backend.function("column_sums")
        a, b = torch.ones(3, 16), torch.ones(16 * 5 + 1)[1:].view(5, 16)
        for x in (a, b, a[:, :1]):
            print(sums(x, a, a).tolist() == [float(len(x))] * x.shape[1] + [3.0] * 32)
        print(len({launch.key for launch in backend.recorder.launches}))
        print(backend.recorder.launches[0].threads)
    """)
    assert printed.split() == ["True", "True", "True", "3", "256"]


def test_a_module_falls_into_its_entries() -> None:
    head = ".version 8.0\n.target sm_90\n.extern .shared .b8 raw[];\n"
    one = ".visible .entry one(.param .u64 p)\n{\n\tret;\n}\n"
    two = ".entry two()\n.maxntid 32\n{\n\t{ .reg .b32 t; }\n\tret;\n}\n"
    between = ".global .align 4 .b8 table[4];\n"
    found = entries(head + one + between + two)
    assert list(found) == ["one", "two"]
    for name, text in found.items():
        assert text.count(".entry") == 1
        assert f".entry {name}" in text
        assert "raw[]" in text
        assert "table[4]" in text


def test_a_summary_counts(found_rows) -> None:
    found = summary(map(json.dumps, found_rows))
    assert found.ran == {"a", "b_kernel"}
    assert found.right == {"b_kernel"}
    assert found.shares() == {"a": 1.0, "b_kernel": 4 / 7}  # what is beyond reach does not count
    assert len(found.findings) == 1
    assert "3 kernels exist, 2 ran (3 variants), 1 were right; 1 of 2 cases right" in found.line()


@pytest.fixture
def found_rows() -> list[dict[str, object]]:
    def row(case: str, errors: list[str], findings: list[object], **executed: str):
        kernels = {
            name.replace("__", " "): {
                "executed": bits,
                "beyond": "10",
                "instructions": 4,
                "launches": 1,
            }
            for name, bits in executed.items()
        }
        return {
            "case": case, "dtype": "float32", "errors": errors, "findings": findings,
            "kernels": kernels, "seconds": 1.0, "thread_instructions": 5,
        }  # fmt: skip

    finding = {"kernel": "a", "kind": "race", "message": "m", "line": 3, "count": 2}
    return [
        {"set": "cuda", "arch": "sm_90", "exist": ["a", "b_kernel", "c"]},
        row("one", ["output 0: error"], [finding], a="80"),
        row("two", [], [finding], a="60", b_kernel__01="f0", b_kernel__02="00"),
    ]


@pytest.mark.parametrize(
    ("factor", "message"), [(1.0, None), (1.001, "output 0: error"), (float("nan"), "non-finite")]
)
def test_the_budget_notices_a_small_error(factor: float, message: str | None) -> None:
    def double(x: torch.Tensor, *, impl: str) -> torch.Tensor:
        return 2 * x * (factor if impl == "cuda" else 1.0)

    wrong = out_of_budget(double, {"x": torch.randn(100)}, "cuda")
    assert bool(wrong) == (message is not None)
    assert message is None or any(message in line for line in wrong)


def test_the_budget_notices_a_written_input() -> None:
    def careless(x: torch.Tensor, *, impl: str) -> torch.Tensor:
        if impl == "cuda":
            x.detach().mul_(0.0)
        return 2 * x.detach().clone() + 0 * x

    wrong = out_of_budget(careless, {"x": torch.ones(3)}, "cuda")
    assert "x was written" in wrong

# SPDX-License-Identifier: Apache-2.0
"""`vtclip.export`: a run as one file that predicts, with the meaning of its numbers next to it.

    image      pixels [B, 3, H, W], preprocessed  ->  probabilities [B, K], temperature applied
    features   image [B, C], and spatial [B, L, Cs] for heads that read it  ->  logits [B, K]

FILE.pt2 is written by torch.export and holds weights and graph. A portable one has plain torch
operators only and runs where vtclip is not installed; the other calls vtclip's compiled ones and is
opened by `vtclip.load_exported`. FILE.onnx is the portable graph for other runtimes. FILE.json has
preprocessing, class names, temperature, digests, which `load_exported` compares first, and
versions. Graphs are made on the CPU in float32; `torch.export.passes.move_to_device_pass` takes one
elsewhere.

Every file is loaded back before it is written, and compared with the run on random and, where the
run's images are still there, on real input, at batch sizes 1 and 3. Files of one call that lie in
one folder are replaced together, so that a killed call leaves all of them old or all new.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from vtclip.files import (
    Json,
    json_digest,
    read_json,
    read_settled,
    sealed,
    settle,
    to_json,
    unsealed,
    write_together,
)
from vtclip.machine import set_threads
from vtclip.names import option
from vtclip.ops._select import only_reference
from vtclip.runs.export_program import BATCHES, ExportJob, feature_job, image_job, of_batches
from vtclip.runs.exported_file import check_exported
from vtclip.runs.multi_label import check_single_run
from vtclip.runs.result import Run, revision, versions
from vtclip.runs.targets import check_target
from vtclip.schemas import by_name, check, one_of, rows, table, text

KINDS = ("image", "features")
TOLERANCE = 1e-4
ABOUT = "the JSON of an export"
_SCHEMA = table(
    {"format": one_of("vtclip-export"), "files": by_name(text), "class_names": rows(text)}
)
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18
MAX_ONNX_BYTES = 2**31 - 1  # of one protobuf message


def export(
    run: str | Path | Run,
    path: str | Path | None,
    *,
    kind: str = "image",
    onnx: str | Path | None = None,
    portable: bool = True,
    fixed_batch: int | None = None,
    overwrite: bool = False,
    model: str | Path | None = None,
    threads: int | None = None,
    cache_dir: str | Path | None = None,
) -> Json:
    """Write the run as `path` (.pt2), `onnx` (.onnx) or both, each with a .json; returns the JSON.

    kind: "image" or "features", see the module's docstring.
    portable: plain torch operators instead of vtclip's own in the .pt2.
    fixed_batch: this batch size and no other, instead of any.
    model: another place of the encoder's weights (see vtclip.clip).

    FloatingPointError, and no file, where a file's numbers differ from the run's by more than 1e-4;
    logits by more than 1e-4 of the largest one, where that is above 1.
    """
    run = run if isinstance(run, Run) else Run.load(run)
    set_threads(threads)
    targets = _targets(path, onnx, overwrite)
    if kind not in KINDS:
        raise ValueError(f"export: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if fixed_batch is not None and fixed_batch < 1:
        raise ValueError(f"export: fixed_batch must be at least 1, got {fixed_batch}")
    if kind == "image":
        check_single_run(run.result, "export")
    job = image_job(run, model) if kind == "image" else feature_job(run, model, cache_dir)
    job.cases = of_batches(job.cases, (fixed_batch,) if fixed_batch else BATCHES)
    files: dict[Path, bytes] = {}
    parity: Json = {}
    if path is not None:
        files[targets[0]] = data = _as_pt2(traced(job, portable, fixed_batch))
        parity["pt2"] = _parity(job, targets[0], load_bytes(data, portable))
    if onnx is not None:
        files[targets[-1]] = data = _as_onnx(job, traced(job, True, fixed_batch))
        parity["onnx"] = _parity(job, targets[-1], _session(data))
    about = _about(job, kind, portable, fixed_batch, parity, files)
    for target in targets:
        files[target.with_suffix(".json")] = to_json(sealed(about))
    write_together(files)
    return about


def load_exported(path: str | Path, *, trust_unknown: bool = False) -> nn.Module:
    """The module in a .pt2 of `export`, portable or not.

    Before anything of it is loaded its sha256 must be the one in the .json next to it, and it may
    hold nothing but what an export of tensors holds (vtclip.runs.exported_file). ValueError or
    FileNotFoundError, in one line, where that is not so.

    trust_unknown: load it without these checks. Loading such a file can run code of its maker's, as
    torch.export.load always can: say it only of files whose maker you trust.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"load_exported: {file} does not exist")
    folder = Path(os.path.realpath(file)).parent
    data = read_settled(folder, lambda: _checked(file, trust_unknown))
    try:
        return load_bytes(data, portable=False)
    except Exception as error:  # torch raises nearly anything of a graph that it cannot read
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(f"load_exported: torch cannot load {file} ({reason})") from error


def _checked(file: Path, trust_unknown: bool) -> bytes:
    """The bytes of the file, compared with what the .json beside it says."""
    data = file.read_bytes()
    if not trust_unknown:
        _check_known(file, data)
    return data


def _check_known(file: Path, data: bytes) -> None:
    """Refuse a file that is not the one its .json names, or that holds more than tensors."""
    beside = file.with_suffix(".json")
    hint = f"{option('trust_unknown')} loads it unchecked, which can run code"
    try:
        about = unsealed(read_json(beside, ABOUT), beside, ABOUT)
        check(about, _SCHEMA, f"not {ABOUT}: {beside}")
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"load_exported: {file} is unknown: {error}; {hint}") from None
    named = about["files"].get(file.name)
    if named is None and len(about["files"]) == 1:  # both were given another name
        named = next(iter(about["files"].values()))
    if hashlib.sha256(data).hexdigest() != named:
        raise ValueError(
            f"load_exported: {file} is not the file that {beside.name} describes (its sha256 "
            f"differs); {hint}"
        )
    try:
        check_exported(data)
    except ValueError as error:
        raise ValueError(f"load_exported: {file}: {error}; {hint}") from None


def load_bytes(data: bytes, portable: bool) -> nn.Module:
    if not portable:
        from vtclip.backends import native, schemas  # noqa: F401, which registers the operators

        native.load_cpu()
        native.load_cuda()
    return torch.export.load(io.BytesIO(data)).module()


def traced(job: ExportJob, portable: bool, fixed_batch: int | None) -> ExportedProgram:
    """The exported program; the batch size is free unless it is fixed."""
    job.program.eval().requires_grad_(False)
    example = next(inputs for inputs in job.cases.values() if len(inputs[0]) != 1 or fixed_batch)
    free = None
    if fixed_batch is None:
        free = {name: {0: torch.export.Dim.DYNAMIC} for name in job.program.inputs}
    operators = only_reference() if portable else nullcontext()
    try:
        with torch.no_grad(), operators, _quiet():
            program: ExportedProgram = torch.export.export(
                job.program, example, dynamic_shapes=free
            )
            program = program.run_decompositions({})
    except (RuntimeError, torch._dynamo.exc.UserError) as error:
        reason = " ".join(str(error).split())[:160]
        hint = "" if fixed_batch else "; fixed_batch may help"
        raise NotImplementedError(
            f"export: torch cannot trace method {job.adapter.head.method}{hint} ({reason})"
        ) from None
    for node in program.graph.nodes:
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            node.meta.pop(key, None)  # they name this machine's files
    return program


def _as_pt2(program: ExportedProgram) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _as_onnx(job: ExportJob, program: ExportedProgram) -> bytes:
    with _quiet():
        converted = torch.onnx.export(
            program,
            (),
            input_names=list(job.program.inputs),
            output_names=[job.program.output],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        message = converted.model_proto  # type: ignore[union-attr]
    size = message.ByteSize()
    if size > MAX_ONNX_BYTES:
        raise ValueError(f"export: one ONNX file holds 2 GiB, this model has {size / 2**30:.1f}")
    data: bytes = message.SerializeToString()
    return data


def _session(data: bytes) -> Callable[..., Tensor]:
    import onnxruntime  # type: ignore[import-not-found, unused-ignore]

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def call(*inputs: Tensor) -> Tensor:
        arrays = {name: array.numpy() for name, array in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, arrays)[0])

    return call


@torch.no_grad()
def _parity(job: ExportJob, path: Path, exported: Callable[..., Tensor]) -> Json:
    """Largest error of each case; logits count relative to the largest where that is above 1."""
    errors = {}
    for name, inputs in job.cases.items():
        wanted, actual = job.expected(*inputs).double(), exported(*inputs).double()
        if actual.shape != wanted.shape:
            shapes = f"{list(wanted.shape)}, got {list(actual.shape)}"
            raise FloatingPointError(f"export: {path.name} must give {shapes}; nothing is written")
        error = (actual - wanted).abs().max() / wanted.abs().max().clamp(min=1)
        errors[name] = float(error)
        if not float(error) <= TOLERANCE:
            raise FloatingPointError(
                f"export: {path.name} differs from the run by {float(error):.3g} on {name}, at "
                f"most {TOLERANCE:g} is allowed; nothing is written"
            )
    return {"max_error": max(errors.values()), "tolerance": TOLERANCE, "cases": errors}


def _targets(path: str | Path | None, onnx: str | Path | None, overwrite: bool) -> list[Path]:
    """The files that are asked for, checked; nothing is touched."""
    targets = []
    for name, file_name, suffix in ("path", path, ".pt2"), ("onnx", onnx, ".onnx"):
        if file_name is None:
            continue
        target, typed = Path(file_name).expanduser(), option(name)
        if target.suffix != suffix:
            raise ValueError(f"export: {typed} must end in {suffix}, got {str(file_name)!r}")
        if not target.parent.is_dir():
            raise FileNotFoundError(f"export: {typed}: the folder {target.parent} does not exist")
        settle(Path(os.path.realpath(target)).parent)
        for file in (target, target.with_suffix(".json")):
            check_target(name, file)
            if file.is_dir() or (file.exists() and not overwrite):
                raise FileExistsError(
                    f"export: {typed}: {file} exists; {option('overwrite')}, or give another name"
                )
        targets.append(target)
    if not targets:
        raise ValueError("export: a .pt2 path or an .onnx path must be given, got neither")
    if onnx is not None:
        missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(
                f"export: {option('onnx')} needs {', '.join(missing)}; pip install 'vtclip[onnx]' "
                "brings it"
            )
    return targets


def _about(
    job: ExportJob,
    kind: str,
    portable: bool,
    fixed_batch: int | None,
    parity: Json,
    files: dict[Path, bytes],
) -> Json:
    """What a program needs to know to use the files without vtclip."""
    adapter, result = job.adapter, job.run.result
    inputs = next(iter(job.cases.values()))
    batch = "batch" if fixed_batch is None else fixed_batch
    shapes = zip(job.program.inputs, inputs, strict=True)
    digests = {name: value for name, value in result["digests"].items() if value is not None}
    onnx = any(path.suffix == ".onnx" for path in files)
    return {
        "format": "vtclip-export",
        "kind": kind,
        "method": adapter.head.method,
        "inputs": {name: {"dtype": "float32", "shape": [batch, *example.shape[1:]]}
                   for name, example in shapes},
        "output": {"name": job.program.output, "dtype": "float32",
                   "shape": [batch, len(adapter.class_names)]},
        "preprocess": job.preprocess,
        "class_names": adapter.class_names,
        "temperature": adapter.temperature,
        "temperature_applied": kind == "image",
        "portable": portable,
        "spatial": adapter.features.get("spatial") if adapter.head.needs_spatial else None,
        "files": {path.name: hashlib.sha256(data).hexdigest() for path, data in files.items()},
        "digests": {**digests, "result": json_digest(result)},
        "parity": parity,
        "versions": {**versions(), **{name: version(name) for name in ONNX_PACKAGES if onnx}},
        "revision": revision(),
    }  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and notes of the exporters, which are not about the user's model."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

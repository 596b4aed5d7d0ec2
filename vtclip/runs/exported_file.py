# SPDX-License-Identifier: Apache-2.0
"""What a .pt2 file may hold to be loaded: what `vtclip.export` writes, and nothing that runs code.

torch.export.load unpickles members of the archive without restriction where the restricted way
fails, evaluates the expressions of sizes as Python, and builds Python source of names and guards.
So before it is called, by torch's own reader of archives:

    members      those that an export of tensors has, each once; no other readable zip inside
    weights      raw numbers, none pickled
    sample input a pickle that torch's restricted reader takes
    graph        operators of aten, vtclip and arithmetic; names that are identifiers; expressions
                 of whole numbers; containers that are tuples, lists and dictionaries

Everything else is a ValueError in one line. The file next to it says which bytes were exported
(vtclip.runs.export): this is for files whose neighbour was made along with them.
"""

from __future__ import annotations

import ast
import io
import math
import re
import zipfile
from collections.abc import Iterator

import torch

from vtclip.files import Json, parse_json

_FIXED = {
    "models/model.json",
    "data/weights/model_weights_config.json",
    "data/constants/model_constants_config.json",
    "data/sample_inputs/model.pt",
    "archive_format",
    "archive_version",
    "byteorder",
    ".data/version",
    ".data/serialization_id",
}
_MAY_LACK = {"byteorder", ".data/version", ".data/serialization_id"}
_NUMBERS = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
_NAME = re.compile(r"[\w.:+\-]*")  # of nodes, weights, dtypes; empty for the outermost module
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|vtclip)\.\w+\.\w+|torch\.sym_\w+|_operator\.\w+|math\.\w+"
)
# aten's only way to the file system, and names that are attributes and no arithmetic
_NO_OPERATOR = re.compile(r".*from_file.*|_operator\.(attrgetter|itemgetter|methodcaller|call|_.*)")
_FREE = ("torch_fn", "from_node", "nn_module_stack", "source_fn_stack", "stack_trace")
_CONTAINERS = {None, "builtins.tuple", "builtins.list", "builtins.dict"}
_CALLS = frozenset(
    [
        *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Mod"),
        *("Equality", "Unequality", "GreaterThan", "StrictGreaterThan", "LessThan"),
        *("StrictLessThan", "And", "Or", "Not", "FloorDiv", "CeilDiv", "CleanDiv", "PythonMod"),
        *("ModularIndexing", "Where", "PowByNatural", "IntTrueDiv", "FloatTrueDiv", "ToFloat"),
        *("TruncToInt", "FloorToInt", "CeilToInt", "RoundToInt", "Identity"),
    ]
)
_WITH_TEXT = ("Symbol", "Integer", "Float")
LONGEST = 4000  # characters of one expression


def check_exported(data: bytes) -> None:
    """ValueError, in one line, where a .pt2 holds more than an export of tensors."""
    try:
        _check(data)
    except (RecursionError, RuntimeError, zipfile.BadZipFile, OSError, LookupError, SyntaxError,
            TypeError, AttributeError, NotImplementedError) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"it is damaged or another format ({reason})") from None


def _check(data: bytes) -> None:
    reader = torch._C.PyTorchFileReader(io.BytesIO(data))
    members = reader.get_all_records()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
    top = names[0].split("/")[0] if names else ""
    # two readers of zip that see different members would let one check what the other loads
    if sorted(names) != sorted(f"{top}/{name}" for name in members) or len(set(names)) < len(names):
        raise ValueError("its list of members is ambiguous")
    for name in members:
        if name not in _FIXED and _NUMBERS.fullmatch(name) is None:
            raise ValueError(f"it holds {ascii(name)[:80]}, which no export writes")
    for name in sorted(_FIXED - _MAY_LACK - set(members)):
        raise ValueError(f"it lacks {name}")
    if reader.get_record("archive_format") != b"pt2":
        raise ValueError("its archive_format is not pt2")
    for kind in ("weights", "constants"):
        _check_numbers(reader, kind, set(members))
    try:
        torch.load(io.BytesIO(reader.get_record("data/sample_inputs/model.pt")), weights_only=True)
    except Exception:  # torch's message proposes to switch the check off
        raise ValueError("its sample input holds other objects than tensors") from None
    _check_graph(parse_json(reader.get_record("models/model.json")))


def _check_numbers(reader: torch._C.PyTorchFileReader, kind: str, members: set[str]) -> None:
    config = parse_json(reader.get_record(f"data/{kind}/model_{kind}_config.json"))
    for name, entry in config["config"].items():
        path = f"data/{kind}/{entry['path_name']}"
        if entry["use_pickle"] is not False or path not in members or not _NUMBERS.fullmatch(path):
            raise ValueError(f"its {kind} hold {ascii(name)[:80]}, which is no plain tensor")
        meta = entry["tensor_meta"]
        whole = [size["as_int"] for size in (*meta["sizes"], *meta["strides"])]
        whole.append(meta["storage_offset"]["as_int"])
        if not all(type(size) is int and 0 <= size < 2**40 for size in whole):
            raise ValueError(f"its {kind} hold {ascii(name)[:80]} without a plain shape")
        if math.prod(size["as_int"] for size in meta["sizes"]) and not reader.get_record(path):
            raise ValueError(f"its {kind} lack the numbers of {ascii(name)[:80]}")
        _check_strings(entry)
        _check_name(name)


def _check_graph(program: Json) -> None:
    for guard in program.get("guards_code", []):
        _check_expression(guard, guards=True)
    _check_strings({name: value for name, value in program.items() if name != "guards_code"})


def _check_strings(value: object) -> None:
    """Every text of the graph, by what torch makes of it."""
    for place, text in _strings(value):
        if place == "expr_str":
            _check_expression(text)
        elif place == "target":
            if not _OPERATOR.fullmatch(text) or _NO_OPERATOR.fullmatch(text):
                raise ValueError(f"it calls {ascii(text)[:80]}, which is no operator of an export")
        elif place in ("in_spec", "out_spec"):
            for kind in _kinds(parse_json(text)):
                if kind not in _CONTAINERS:
                    raise ValueError(f"it holds a {ascii(kind)[:80]}, which is no plain container")
        elif place in ("as_operator", "as_custom_obj", "as_graph", "class_fqn"):
            raise ValueError(f"it holds {place}, which no export writes")
        elif place in ("forward_arg_names", "name") and not text.isidentifier() and text:
            raise ValueError(f"{ascii(text)[:80]} is not the name of a value")
        elif place not in _FREE:
            _check_name(text)


def _check_name(text: str) -> None:
    if _NAME.fullmatch(text) is None:
        raise ValueError(f"{ascii(text)[:80]} is no name that an export writes")


def _strings(value: object, place: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) for each text below, and ("", key) for each key."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield "", key
            if key in ("as_operator", "as_custom_obj", "as_graph", "class_fqn"):
                yield key, ""
            yield from _strings(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, place)


def _kinds(spec: object) -> Iterator[object]:
    """The types that a specification of containers names."""
    if isinstance(spec, dict):
        yield spec.get("type")
        context = spec.get("context")
        if context is not None and not isinstance(parse_json(context), list | None):
            yield context
        yield from _kinds(spec.get("children_spec"))
    elif isinstance(spec, list):
        for item in spec:
            yield from _kinds(item)


def _check_expression(text: object, *, guards: bool = False) -> None:
    """Refuse what is not arithmetic of sizes; torch evaluates it as Python."""
    if not isinstance(text, str) or len(text) > LONGEST:
        raise ValueError("an expression of its sizes is too long")
    for node in ast.walk(ast.parse(text, mode="eval")):
        if not (_is_guard(node) if guards else _is_size(node)):
            raise ValueError(f"{ascii(text)[:80]} is no expression of sizes")


_SIZE_NODES = (ast.Expression, ast.Load, ast.keyword, ast.UnaryOp, ast.USub)
_GUARD_NODES = (
    *_SIZE_NODES, ast.Compare, ast.BoolOp, ast.And, ast.Or, ast.Not, ast.Eq, ast.NotEq, ast.Lt,
    ast.LtE, ast.Gt, ast.GtE, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod,
    ast.Subscript, ast.Index,
)  # fmt: skip


def _is_size(node: ast.AST) -> bool:
    """Of calls such as Mul(Integer(4), Symbol('s0', positive=True))."""
    if isinstance(node, ast.Call):
        called = node.func.id if isinstance(node.func, ast.Name) else ""
        texts = [a for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        texts += [k for k in node.keywords if not _is_flag(k.value)]  # type: ignore[misc]
        words = [str(getattr(part, "value", "")) for part in texts]
        plain = all(re.fullmatch(r"[a-z]\w*|\d[\d.]*", word) for word in words)
        return called in _CALLS and (not texts or (called in _WITH_TEXT and plain))
    if isinstance(node, ast.Constant):
        small = isinstance(node.value, int) and abs(node.value) < 2**63
        return small or isinstance(node.value, str | float)
    return isinstance(node, _SIZE_NODES) or (isinstance(node, ast.Name) and node.id in _CALLS)


def _is_flag(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and isinstance(value.value, bool | int)


def _is_guard(node: ast.AST) -> bool:
    """Of comparisons such as L['image'].size()[0] == L['spatial'].size()[0]."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and not node.keywords and len(node.args) <= 1
    if isinstance(node, ast.Attribute):
        return node.attr in ("size", "shape", "stride", "ndim", "dim")
    if isinstance(node, ast.Name):
        return node.id == "L"
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int) or (
            isinstance(node.value, str) and node.value.isidentifier()
        )
    return isinstance(node, _GUARD_NODES)

# SPDX-License-Identifier: Apache-2.0
"""Opcodes without side effects: one row each.

A row is an expression of the operands {0}, {1}, ..., their types and the result's type:
t the instruction's type, s and n that type as signed and unsigned, w twice as wide, u and i 32
bits unsigned and signed, p a predicate. {t} is the NumPy type of the instruction's type. A key may
name a modifier (mul.hi) and a class of types (:f floats); the most special key is taken.
Halves are computed in float32 and rounded once.
"""

import functools

from . import types

TABLE = {
    "mul.hi": ("multiply_high({0}, {1})", "tt", "t"),
    "mul.wide": ("{0}.astype({w}) * {1}.astype({w})", "tt", "w"),
    "mad": ("{0} * {1} + {2}", "sss", "s"),
    "mad.hi": ("multiply_high({0}, {1}) + {2}", "ttt", "t"),
    "mad.wide": ("{0}.astype({w}) * {1}.astype({w}) + {2}", "ttw", "w"),
    "fma:f32": ("({0}.astype(f8) * {1} + {2}).astype(f4)", "ttt", "t"),
    "fma:f64": ("fma64({0}, {1}, {2})", "ttt", "t"),
    "fma:f": ("{0}.astype(f8) * {1} + {2}", "ttt", "t"),
    "sad": ("np.maximum({0}, {1}) - np.minimum({0}, {1}) + {2}", "ttt", "t"),
    "div": ("divide({0}, {1})", "tt", "t"),
    "div:f": ("{0} / {1}", "tt", "t"),
    "rem": ("{0} - divide({0}, {1}) * {1}", "tt", "t"),
    "abs": ("np.abs({0})", "t", "t"),
    "neg": ("-{0}", "s", "s"),
    "copysign:f": ("np.copysign({1}, {0})", "tt", "t"),
    "testp.notanumber:f": ("np.isnan({0})", "t", "p"),
    "testp.number:f": ("~np.isnan({0})", "t", "p"),
    "rcp:f": ("{t}(1) / {0}", "t", "t"),
    "rsqrt:f": ("{t}(1) / np.sqrt({0})", "t", "t"),
    "not": ("~{0}", "s", "s"),
    "cnot": ("({0} == 0).astype({t})", "s", "s"),
    "shl": ("shift_left({0}, {1})", "su", "s"),
    "shr": ("shift_right({0}, {1})", "tu", "t"),
    "shf.l.wrap": ("funnel({0}, {1}, {2}, True, True)", "iiu", "i"),
    "shf.l.clamp": ("funnel({0}, {1}, {2}, True, False)", "iiu", "i"),
    "shf.r.wrap": ("funnel({0}, {1}, {2}, False, True)", "iiu", "i"),
    "shf.r.clamp": ("funnel({0}, {1}, {2}, False, False)", "iiu", "i"),
    "lop3": ("any_logic({0}, {1}, {2}, {3})", "iiii", "i"),
    "prmt": ("permute({0}, {1}, {2})", "iii", "i"),
    "clz": ("leading_zeros({0})", "n", "i"),
    "popc": ("np.bitwise_count({0}).astype(i4)", "n", "i"),
    "bfind": ("highest_bit({0}, False)", "t", "i"),
    "bfind.shiftamt": ("highest_bit({0}, True)", "t", "i"),
    "brev": ("reversed_bits({0})", "s", "s"),
    "bfi": ("insert_field({0}, {1}, {2}, {3})", "ssuu", "s"),
    "bfe": ("extract_field({0}, {1}, {2})", "tuu", "t"),
    "bmsk.clamp": ("insert_field(i4(-1), i4(0), {0}, {1})", "uu", "i"),
    "selp": ("where({2}, {0}, {1})", "ssp", "s"),
    "slct": ("where({2} >= 0, {0}, {1})", "ssi", "s"),
}
OPERATORS = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
TABLE |= {name: (f"{{0}} {sign} {{1}}", "ss", "s") for name, sign in OPERATORS.items()}
for name in ("min", "max"):
    TABLE[name] = TABLE[f"{name}.NaN:f"] = (f"np.{name}imum({{0}}, {{1}})", "tt", "t")
    TABLE[f"{name}:f"] = (f"np.f{name}({{0}}, {{1}})", "tt", "t")
# functions of one float, and NumPy's name
FUNCTIONS = {"sqrt": "sqrt", "ex2": "exp2", "lg2": "log2", "sin": "sin", "cos": "cos"}
FUNCTIONS |= {"tanh": "tanh", "testp.finite": "isfinite", "testp.infinite": "isinf"}
for name, function in FUNCTIONS.items():
    TABLE[f"{name}:f"] = (f"np.{function}({{0}})", "t", "p" if "." in name else "t")
TABLE |= {f"mad:{kind}": TABLE[f"fma:{kind}"] for kind in ("f32", "f64")}
# of float32, rounded otherwise than to nearest; .ftz is accepted, and subnormals are kept
ROUNDED = ("add", "sub", "mul", "mad", "div:f", "rcp:f", "sqrt:f")
ROUNDED = {k.split(":")[0]: TABLE[k][0].replace("{0}", "{0}.astype(f8)") for k in ROUNDED}
ROUNDED["fma"] = ROUNDED["mad"]
MODIFIERS = """rn rz rm rp approx full ftz sat relu NaN lo hi wide l r wrap clamp
    finite infinite notanumber number shiftamt"""
MODIFIERS = set(MODIFIERS.split())
SIGNS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARED = {name: f"{{0}} {sign} {{1}}" for name, sign in SIGNS.items()}
# of floats: ordered unless the name ends in u
FLOATS_COMPARED = {
    **COMPARED,
    "ne": "({0} < {1}) | ({0} > {1})",
    "num": "({0} == {0}) & ({1} == {1})",
    "nan": "({0} != {0}) | ({1} != {1})",
}
OPPOSITES = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}
FLOATS_COMPARED |= {name: f"~({FLOATS_COMPARED[to]})" for name, to in OPPOSITES.items()}
COMPARED |= {"lo": COMPARED["lt"], "ls": COMPARED["le"]}
COMPARED |= {"hi": COMPARED["gt"], "hs": COMPARED["ge"]}


@functools.cache
def row(parts: tuple[str, ...], kind: str) -> tuple[str, str, str] | None:
    """The most special row for an opcode whose type is `kind`."""
    modifiers = [p for p in parts[1:] if p in MODIFIERS and p != "ftz"]
    floats = [":f"] if kind in types.FLOATS | types.HALVES else []
    for end in (f":{kind}", *floats, ""):
        for names in (modifiers, *([m] for m in modifiers), []):
            if found := TABLE.get(".".join([parts[0], *names]) + end):
                return found
    return None

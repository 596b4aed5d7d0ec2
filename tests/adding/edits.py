# SPDX-License-Identifier: Apache-2.0
"""What the toys add to files that exist: path -> (place, text), the text going before the place.

A place must occur in its file exactly once. New files are those of `templates/`.
"""

from __future__ import annotations

Edits = dict[str, tuple[tuple[str, str], ...]]

OPERATOR: Edits = {
    "vtclip/backends/schemas.py": (
        (
            "@triton_operator  # a launch saved on a GPU",
            """\
@operator
def toy_dots_fwd(image: Tensor, text: Tensor, scale: float) -> Tensor:
    return image.new_empty(image.shape[:1])


@operator
def toy_dots_bwd(
    grad_dots: Tensor, image: Tensor, text: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return _like(image), _like(text)


""",
        ),
    ),
    "vtclip/ops/__init__.py": (
        (
            "from vtclip.ops.unit_products import",
            "from vtclip.ops.toy_dots import toy_dots\n",
        ),
        ('    "unit_products",\n', '    "toy_dots",\n'),
    ),
    "vtclip/testing/problems.py": (
        (
            '    Op(\n        "unit_products",\n',
            """\
    Op(
        "toy_dots",
        {"image": "B D", "text": "B D", "scale": 100.0},
        outputs=("dots",),
    ),
""",
        ),
    ),
    "kernels/_tiles.py": (
        (
            '    "unit_products_fwd": Kind(',
            '    "toy_dots": Kind(RowTile, ("B", "D")),\n',
        ),
        ('    "unit_products_fwd": (', '    "toy_dots": (4096,),\n'),
    ),
    "kernels/README.md": (
        (
            "| `unit_products.py` |",
            "| `toy_dots.py` | `toy_dots_fwd`, `_bwd` | forward; backward |\n",
        ),
    ),
    "vtclip/tune/jobs.py": (('        "unit_products": "",\n', '        "toy_dots": "",\n'),),
    "benchmarks/registry.py": (
        (
            "def unit_products(device: str",
            """\
def toy_dots(device: str, dtype: torch.dtype, **shape: int) -> Work:
    providers = {"multiply, sum": lambda image, text: 100.0 * (image * text).sum(-1)}
    return _work("toy_dots", device, dtype, shape, providers)


""",
        ),
        (
            '            Case("unit_products", ',
            '            Case("toy_dots", {**sizes, "D": 512}, toy_dots),\n',
        ),
    ),
    "docs/operators.md": (
        (
            "| `unit_products` |",
            "| `toy_dots` | inner products of paired rows | yes | yes | yes | yes |\n",
        ),
    ),
    "CHANGELOG.md": (
        ("- Operators `unit_products`, and", "- Operator `toy_dots`: inner products of rows.\n"),
    ),
}

METHOD: Edits = {
    "vtclip/heads/__init__.py": (
        (
            "from vtclip.heads.vtclip import",
            "from vtclip.heads.toy_scale import ToyScale as ToyScale\n",
        ),
        ("ZeroShot, Auto),", "ToyScale, "),
    ),
    "vtclip/names.py": (('"rada", "auto"),', '"toy-scale", '),),
    "tests/heads/test_common.py": (
        ('    "zeroshot": {},\n', '    "toy-scale": {"start": 0.5},\n'),
        ('"clip-adapter", "mm-adapter"}', '"toy-scale", '),
    ),
    "docs/methods.md": (("| `rada` | a mask", "| `toy-scale` | one temperature | training |\n"),),
    "CHANGELOG.md": (
        ("- Methods `clip-adapter`, `coop`,", "- Method `toy-scale`: one temperature.\n"),
    ),
}

DATA_SET: Edits = {
    "vtclip/data/sets/table.py": (
        (
            '    _split(\n        "dtd",\n',
            """\
    _split(
        "toy_shapes",
        "ToyShapes",
        "ToyShapes",
        folder="toy_shapes",
        images="images",
        template="a drawing of a {}.",
        classes=3,
        counts=(30, 10, 20),
        home="https://example.org (a template, not a data set)",
    ),
""",
        ),
    ),
    "tests/helpers/trees.py": (
        (
            '    "dtd": [("banded", ',
            '    "toy_shapes": [("dot", "dot"), ("line", "line"), ("ring", "ring")],\n',
        ),
    ),
    "tests/data/test_sets.py": (
        ("\n    assert len(TEST_ONLY) == ", " + 1"),
        ('        ("DTD", "dtd"),\n', '        ("Toy-Shapes", "toy_shapes"),\n'),
    ),
    "CHANGELOG.md": (("- The field's data sets by name", "- The data set ToyShapes by name.\n"),),
}

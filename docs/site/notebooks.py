# SPDX-License-Identifier: Apache-2.0
"""Writes and executes the notebooks of docs/examples: `python docs/site/notebooks.py`.

Needs vtclip[docs]. The notebooks are committed with their output.
"""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parents[1] / "examples"
OWN_IMAGES = [
    """# From a folder of images to a classifier

Drawn pictures stand in for yours, so that everything runs here without a network: 24 classes,
12 pictures each.""",
    """import tempfile
from pathlib import Path

import torch

import vtclip
from vtclip.demo.run import draw_images

torch.set_num_threads(1)
place = Path(tempfile.mkdtemp())
images = draw_images(place, per_class=12, seed=7).folder
sorted(path.name for path in images.iterdir())[:6]""",
    """`fit` sets half of every class apart, trains on the rest and tests once. Without `model` it
takes the small bundled one; for photos pass `model="ViT-B-32:openai"`. A run shows itself: accuracy
first, then which classes it confuses.""",
    """run = vtclip.fit(images, shots=8, out=place / "run", cache_dir=place / "cache")
run""",
    """Which test images are wrong, and how sure the run was:""",
    """tested = [row for row in run.rows if row["role"] == "test"]
wrong = [row for row in tested if row["label"] != row["predicted"]]
for row in sorted(wrong, key=lambda row: -row["probability"])[:5]:
    print(f"{row['file']:26} taken for {row['predicted']:18} {row['probability']:.2f}")""",
    """New images: paths, bytes, PIL images, arrays or tensors.""",
    """from PIL import Image

classifier = vtclip.Classifier.load(place / "run")
picture = Image.open(images / "striped heart" / "000.png")
for label, probability in classifier.predict(picture, topk=3):
    print(f"{probability:.2f}  {label}")
picture.resize((192, 192))""",
]
SHARED_QUERY = [
    """# One set of queries, many images

`cross_attn` is softmax(scale q kᵀ) v for queries that all images share: the query [1, H, K, d] is
neither expanded nor copied, and its gradient is summed inside the kernel.""",
    """import torch
import torch.nn.functional as F

from vtclip import ops

torch.manual_seed(0)
torch.set_num_threads(1)
query = torch.randn(1, 8, 100, 64, requires_grad=True)
key, value = torch.randn(2, 32, 8, 49, 64)
out = ops.cross_attn(query, key, value)
expected = F.scaled_dot_product_attention(query.expand(32, -1, -1, -1), key, value)
out.shape, (out - expected).detach().abs().max().item()""",
    """The gradient of the query has the query's own shape:""",
    """out.square().sum().backward()
query.grad.shape""",
    """As a module: learned queries, as in Perceiver or Q-Former pooling. Here 4 queries learn to
find the tokens that carry a mark, and `weights` shows where they look.""",
    """from vtclip import nn

pool = nn.SharedQueryAttention(num_queries=4, dim=32, heads=2)
answer = torch.nn.Linear(4 * 32, 1)
optimizer = torch.optim.Adam([*pool.parameters(), *answer.parameters()], lr=3e-3)


def batch(count):
    tokens = torch.randn(count, 49, 32)
    place = torch.randint(49, (count,))
    sign = torch.randint(2, (count,)) * 2.0 - 1
    tokens[torch.arange(count), place, 0] += 6  # the mark
    tokens[torch.arange(count), place, 1] += 3 * sign  # what is asked for
    return tokens, place, sign


for _ in range(400):
    tokens, _, sign = batch(64)
    loss = F.soft_margin_loss(answer(pool(tokens).flatten(1))[:, 0], sign)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

tokens, place, sign = batch(500)
with torch.no_grad():
    right = ((answer(pool(tokens).flatten(1))[:, 0] > 0) == (sign > 0)).float().mean()
    looked = pool.weights(tokens).mean((1, 2)).argmax(-1)  # [B, H, K, L] to [B]
found = (looked == place).float().mean()
print(f"right {100 * right:.1f} %, most weight on the marked token {100 * found:.1f} %")""",
]


def write(name: str, cells: list[str]) -> None:
    """Markdown and code by turns, executed; without what libraries wrote to stderr."""
    notebook = nbformat.v4.new_notebook()
    new = (nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell)
    notebook.cells = [new[index % 2](text) for index, text in enumerate(cells)]
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index}"
    NotebookClient(notebook, timeout=300, record_timing=False).execute()
    for cell in notebook.cells:
        outputs = [one for one in cell.get("outputs", []) if one.get("name") != "stderr"]
        for one in outputs:
            one.get("data", {}).pop("image/jpeg", None)
        if cell.cell_type == "code":
            cell.outputs = outputs
    notebook.metadata["kernelspec"] = {
        "display_name": "Python 3", "language": "python", "name": "python3"
    }  # fmt: skip
    notebook.metadata.pop("language_info", None)
    nbformat.write(notebook, HERE / name)


if __name__ == "__main__":
    write("own_images.ipynb", OWN_IMAGES)
    write("shared_query.ipynb", SHARED_QUERY)

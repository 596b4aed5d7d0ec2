# SPDX-License-Identifier: Apache-2.0
"""Asks a run that `vtclip serve RUN` serves, with the standard library alone.

vtclip serve run --port 8000        # in another terminal; pip install "vtclip[serve]"
python docs/examples/ask_a_service.py http://127.0.0.1:8000 photo.jpg [MORE ...]
"""

import json
import sys
import uuid
from pathlib import Path
from urllib.request import Request, urlopen


def form_of(paths: list[Path]) -> tuple[bytes, str]:
    """Body and content type of a form with the files in fields called "images"."""
    mark = uuid.uuid4().hex
    parts = []
    for number, path in enumerate(paths):
        head = f'Content-Disposition: form-data; name="images"; filename="{number}{path.suffix}"'
        parts.append(f"--{mark}\r\n{head}\r\n\r\n".encode() + path.read_bytes() + b"\r\n")
    return b"".join(parts) + f"--{mark}--\r\n".encode(), f"multipart/form-data; boundary={mark}"


def main(address: str, paths: list[Path]) -> None:
    with urlopen(f"{address}/health", timeout=10) as answer:
        health = json.load(answer)
    print(f"{health['run']}: {health['method']} of {health['classes']} classes")
    body, kind = form_of(paths)
    request = Request(f"{address}/api/predict?topk=2", body, {"Content-Type": kind})
    with urlopen(request, timeout=60) as answer:
        results = json.load(answer)["images"]
    for path, result in zip(paths, results, strict=True):
        if result.get("error"):
            print(f"{path.name}: {result['error']}")
            continue
        best = result["predictions"][0]
        word = "unknown" if result.get("unknown") else best["label"]
        print(f"{path.name}: {word} ({100 * best['probability']:.1f} %)")


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"), [Path(word) for word in sys.argv[2:]])

# SPDX-License-Identifier: Apache-2.0
"""Builds the site into build/site and serves it on this machine: `python docs/serve.py [PORT]`."""

from __future__ import annotations

import http.server
import subprocess
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
SITE = HERE.parent / "build" / "site"


def main() -> None:
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8001
    subprocess.run([sys.executable, "-m", "sphinx", "-W", "-q", str(HERE), str(SITE)], check=True)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"http://127.0.0.1:{port}/index.html", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()

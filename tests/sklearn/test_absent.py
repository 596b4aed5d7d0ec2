# SPDX-License-Identifier: Apache-2.0
"""Without scikit-learn one line says what to install, and nothing else needs it."""

from __future__ import annotations

import subprocess
import sys


def test_the_extra_is_named():
    code = (
        "import sys\nsys.modules['sklearn'] = None\nimport vtclip\nprint(vtclip.fit.__name__)\n"
        "try:\n    import vtclip.sklearn\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "fit",
        "vtclip.sklearn needs scikit-learn, which is not installed: pip install 'vtclip[sklearn]'",
    ]

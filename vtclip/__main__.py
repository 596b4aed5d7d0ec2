# SPDX-License-Identifier: Apache-2.0
"""`python -m vtclip` is the `vtclip` command."""

import sys

from vtclip.cli import main

if __name__ == "__main__":
    sys.exit(main())

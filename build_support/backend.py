# SPDX-License-Identifier: Apache-2.0
"""setuptools' build hooks, with the torch that is already installed.

An isolated build would install torch a second time. Where the target environment has a torch the
extension can be built against (the stable ABI makes any version from 2.11 on good), its folder is
appended to the path; only where it lacks one is torch asked for. pip installs what a build requires
before what the package does, and always with all dependencies, so that an empty environment pays
for two torches unless `pip install torch` comes first. VTCLIP_EXT=off needs none.
setuptools' own requirement hooks are not called: they run setup.py, which imports torch.
"""

import os
import re
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403

OLDEST = (2, 11)
PURELIB = Path(sysconfig.get_path("purelib"))


def _installed_torch() -> bool:
    version = PURELIB / "torch" / "version.py"
    if not version.is_file():
        return False
    found = re.search(r"__version__ = '(\d+)\.(\d+)", version.read_text())
    return found is not None and (int(found[1]), int(found[2])) >= OLDEST


def _requirements(config_settings=None):
    if os.environ.get("VTCLIP_EXT", "auto") == "off" or _installed_torch():
        return []
    sys.stderr.write(
        "vtclip: no torch here yet: pip installs one for the build and then yours;"
        " `pip install torch` first saves that\n"
    )
    return ["torch>=2.11", "numpy"]


get_requires_for_build_wheel = _requirements
get_requires_for_build_editable = _requirements


def get_requires_for_build_sdist(config_settings=None):
    return []


def _with_torch(hook):
    def run(*args, **kwargs):
        if _installed_torch() and str(PURELIB) not in sys.path:
            sys.path.append(str(PURELIB))
        return hook(*args, **kwargs)

    return run


def build_sdist(*args, **kwargs):
    os.environ["VTCLIP_EXT"] = "off"
    return _setuptools.build_sdist(*args, **kwargs)


build_wheel = _with_torch(_setuptools.build_wheel)
build_editable = _with_torch(_setuptools.build_editable)
prepare_metadata_for_build_wheel = _with_torch(_setuptools.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _with_torch(_setuptools.prepare_metadata_for_build_editable)

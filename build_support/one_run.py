# SPDX-License-Identifier: Apache-2.0
"""All libraries compiled in one run of ninja, so that no core waits where one library ends."""

import os
import sys
from pathlib import Path

import toolchain


def one_run(base: type, build_temp: Path, longest: tuple[str, ...]) -> type:
    """torch's BuildExtension `base`, whose extensions have the same flags, in one run.

    build_temp is kept: the next build compiles what has changed. Files whose names begin with one
    of `longest` come first, in that order, and .cu before .cpp.
    """

    def place(source: str) -> tuple[bool, int, str]:
        stem = Path(source).stem
        rank = next((i for i, name in enumerate(longest) if stem.startswith(name)), len(longest))
        return not source.endswith(".cu"), rank, source

    class Build(base):  # type: ignore[misc]
        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = str(build_temp)
            self.parallel = None  # ninja's part
            self.objects: dict[str, str] = {}

        def build_extension(self, extension) -> None:
            """Takes the extension's objects out of the one run, and links them."""
            ninja = self.compiler.compile

            def compiled(sources, **options):
                if not self.objects:
                    self.objects = self.compile_all(ninja, options)
                return [self.objects[source] for source in sources]

            self.compiler.compile = compiled
            try:
                super().build_extension(extension)
            finally:
                self.compiler.compile = ninja

        def compile_all(self, ninja, options) -> dict[str, str]:
            sources = sorted({s for e in self.extensions for s in e.sources}, key=place)
            jobs = os.environ.setdefault("MAX_JOBS", str(toolchain.jobs()))
            os.environ.setdefault("NINJA_STATUS", "vtclip: file %f of %t compiled, %e s: ")
            sys.stderr.write(f"vtclip: {len(sources)} files, {jobs} at a time (MAX_JOBS)\n")
            return dict(zip(sources, ninja(sources, **options), strict=True))

    return Build

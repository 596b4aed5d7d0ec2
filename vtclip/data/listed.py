# SPDX-License-Identifier: Apache-2.0
"""One door to every source of image files: what it lists, under the names its classes go by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vtclip.data.class_names import with_class_names
from vtclip.data.folders import scan_folder
from vtclip.data.image_files import ImageFiles


def list_images(
    source: str | Path | ImageFiles,
    *,
    follow_links: bool = False,
    class_names: Mapping[str, str] | None = None,
) -> ImageFiles:
    """The image files of `source` in their fixed order; nothing is decoded.

    source: a folder of class folders, or files that are listed already.
    class_names: from the names that the source gives its classes to those that stand for them.
    """
    if isinstance(source, ImageFiles):
        return source
    files = scan_folder(source, follow_links=follow_links)
    return with_class_names(files, class_names)

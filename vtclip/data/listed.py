# SPDX-License-Identifier: Apache-2.0
"""One door to every source of image files: what it lists, under the names its classes go by."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from vtclip.data.class_names import with_class_names
from vtclip.data.folders import scan_folder
from vtclip.data.image_datasets import is_saved_dataset, read_saved_dataset
from vtclip.data.image_files import ImageFiles, InMemory
from vtclip.data.lists import read_list


def list_images(
    source: str | Path | ImageFiles | InMemory,
    *,
    follow_links: bool = False,
    class_names: Mapping[str, str] | None = None,
    empty_classes: bool = False,
    absent_ok: bool = False,
) -> ImageFiles:
    """The image files of `source` in their fixed order; nothing is decoded.

    source: a folder of class folders, a list of files (vtclip.data.lists), a folder that
        `save_to_disk` of the library datasets wrote, images in memory (vtclip.data.image_datasets),
        or files that are listed already, which stay as they are.
    follow_links: scan linked folders too; files that a list names are read wherever they are.
    class_names: from the names that the source gives its classes to those that stand for them; each
        class of the source must have an entry.
    empty_classes: a class folder without images is a class of no image instead of an error.
    absent_ok: images that a list names and that are not there are passed over instead of refused.
    """
    if isinstance(source, ImageFiles):
        return source
    if isinstance(source, InMemory):
        images = source.images
    else:
        path = Path(source).expanduser()
        if path.is_file():
            images = read_list(path, absent_ok)
        elif is_saved_dataset(path):
            images = read_saved_dataset(path)
        else:
            images = scan_folder(path, follow_links=follow_links, empty_classes=empty_classes)
    return with_class_names(images, class_names)


@contextlib.contextmanager
def said_later() -> Iterator[None]:
    """Keeps what a list has to say for its next reading, so that it is said once."""
    loggers = [logging.getLogger(f"vtclip.data.{name}") for name in ("lists", "list_rows")]

    def drop(record: logging.LogRecord) -> bool:
        return False

    for logger in loggers:
        logger.addFilter(drop)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(drop)

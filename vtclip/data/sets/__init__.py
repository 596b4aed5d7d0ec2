# SPDX-License-Identifier: Apache-2.0
"""The usual few-shot data sets in the folder layout of CoOp's DATASETS.md, only ever read.

`find_set(name)` describes a set, `open_listing(spec, root)` reads its official lists, `check_sets`
says what is there and what is missing. A set without its list files is refused: no split is
invented. Nothing below the root is written, moved or locked. `register_data_set` adds others.
"""

from vtclip.data.image_files import absent_images
from vtclip.data.sets.known import SETS
from vtclip.data.sets.listing import ImageList, Listing, SetError, Spec
from vtclip.data.sets.reading import AnySource, SetSource, as_source, open_listing, source_name
from vtclip.data.sets.register import register_data_set
from vtclip.data.sets.table import find_set

__all__ = [
    "SETS",
    "AnySource",
    "ImageList",
    "Listing",
    "SetError",
    "SetSource",
    "Spec",
    "absent_images",
    "as_source",
    "find_set",
    "open_listing",
    "register_data_set",
    "source_name",
]

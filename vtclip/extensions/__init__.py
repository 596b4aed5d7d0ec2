# SPDX-License-Identifier: Apache-2.0
"""Names that other packages add: methods and data sets, registered or installed.

    [project.entry-points."vtclip.methods"]
    centroid = "my_package.heads:Centroid"

    [project.entry-points."vtclip.data_sets"]
    leaves = "my_package.sets:LEAVES"

The object of a method is a subclass of `vtclip.heads.Head`, that of a data set a
`vtclip.data.sets.Spec`. A distribution is imported when its name is asked for, or when every head
or set is looked at; its names alone are read without it.
"""

from vtclip.extensions.registry import DATA_SETS as DATA_SETS
from vtclip.extensions.registry import METHODS as METHODS
from vtclip.extensions.registry import Registry as Registry
from vtclip.extensions.registry import names_beside as names_beside

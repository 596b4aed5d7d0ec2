# SPDX-License-Identifier: Apache-2.0
"""Sources x methods x shots x seeds as one list of jobs, and the report of their results.

jobs.py       the list: a pure function of what was asked for
rows.py       the folder of results: settings, one JSON line per job, locks
sources.py    every source opened once, its features kept between jobs
run.py        one process's share of the list, and the tables of all rows
cells.py      rows in groups, lines and cells: means, intervals, missing seeds (docs/statistics.md)
report.py     rows read and checked, next to published numbers (published.py, published.json)
tables.py     the tables of a report; csv_files.py the same as CSV; panels.py its pictures
latex.py      methods x data sets at one number of shots, for a paper
page.py       its page and its Markdown, of which a benchmark's table.md is one
"""

# SPDX-License-Identifier: Apache-2.0
"""Sources x methods x shots x seeds as one list of jobs, and what came out of them.

jobs.py     the list: a pure function of what was asked for
rows.py     the folder of results: settings, one JSON line per job, locks
sources.py  every source opened once, its features kept between jobs
run.py      one process's share of the list
table.py    means, intervals, Markdown and CSV
cells.py    rows in groups, lines and cells, settings that differ kept apart
report.py   rows read and checked, beside published numbers (published.py, published.json)
tables.py   the tables of a report; panels.py its pictures; page.py its page and Markdown
"""

# SPDX-License-Identifier: Apache-2.0
"""Runs: folders that `fit` writes and that evaluate, extend, export, repeat and predict read."""

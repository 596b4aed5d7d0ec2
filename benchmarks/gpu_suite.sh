#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything a CUDA device has to say about vtclip, into OUT_DIR; summary.md there is the page to read.
#   benchmarks/gpu_suite.sh OUT_DIR [MINUTES]        30 minutes where none are named
# With --rehearse the same sequence on CPU at tiny sizes. PYTHON names the interpreter.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_suite.py" "$@"

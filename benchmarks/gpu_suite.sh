#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything a CUDA device has to say about vtclip, into OUT_DIR; summary.md there is the page to read.
#   benchmarks/gpu_suite.sh OUT_DIR [MINUTES]     9 minutes where none are named, end to end
#   benchmarks/gpu_suite.sh OUT_DIR --sanitizer   compute-sanitizer, in a run of its own
# With --rehearse the same sequence on CPU at tiny sizes. PYTHON names the interpreter.
GPU_SUITE_START=$(date +%s.%N) exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_suite.py" "$@"

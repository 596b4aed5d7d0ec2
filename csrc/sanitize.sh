#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds the CPU kernels with the address and undefined-behaviour sanitizers in a copy of the tracked
# files and runs their tests there. Arguments go to pytest. PYTHON and CXX choose the tools.
set -eu
python=${PYTHON:-python}
root=$(cd "$(dirname "$0")/.." && pwd)
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
(cd "$root" && git ls-files -z | tar --null --ignore-failed-read -T - -cf -) | tar -xf - -C "$copy"
cd "$copy"

flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
CFLAGS="$flags" CXXFLAGS="$flags" LDFLAGS="$flags" VTCLIP_EXT=cpu \
  "$python" setup.py build_ext --inplace

# The runtime must come first in the process; libstdc++ lets it see exceptions thrown.
gcc=${CXX:-g++}
runtime="$($gcc -print-file-name=libasan.so) $($gcc -print-file-name=libubsan.so)"
runtime="$runtime $($gcc -print-file-name=libstdc++.so.6)"
for capability in scalar avx2 avx512 avx512_bf16; do
  echo "sanitize: VTCLIP_CPU_CAPABILITY=$capability"
  VTCLIP_CPU_CAPABILITY=$capability LD_PRELOAD="$runtime" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
    PYTHONPATH="$copy" "$python" -m pytest -q -p no:cacheprovider tests/ops/test_cpu_kernels.py "$@"
done

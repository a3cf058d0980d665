#!/usr/bin/env bash
# Compiles the CUDA kernels for the CPU (cuda_emulation.h) with their test, and runs it:
#
#     cuda_logic.sh SANITIZERS ROUNDS [SEED]
#
# SANITIZERS as for -fsanitize=, or "" for the launch shapes of the GPU without a sanitizer; with one the shapes are
# small, so that few elements make many blocks. CXX chooses the compiler.
set -euo pipefail
cd "$(dirname "$0")/../.."
sanitizers=$1 rounds=$2 seed=${3:-1}
flags=(-std=c++17 -g -O1 -Wall -Wextra -Wno-clobbered -Wno-unknown-pragmas -Wno-subobject-linkage -ffp-contract=off
  -I csrc -I tests/native)
if [ -n "$sanitizers" ]; then
  flags+=("-fsanitize=$sanitizers" -fno-sanitize-recover=all -DDISTOPT_CUDA_SEGMENT_THREADS=64
    -DDISTOPT_CUDA_KEYS_PER_THREAD=4 -DDISTOPT_CUDA_TILE_THREADS=64)
fi
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
for source in csrc/cuda/*.cu; do
  "${CXX:-g++}" "${flags[@]}" -include tests/native/cuda_emulation.h -x c++ -c "$source" \
    -o "$objects/$(basename "$source").o"
done
"${CXX:-g++}" "${flags[@]}" tests/native/cuda_logic_test.cpp "$objects"/*.o -o "$objects/test"
# The fibers of the emulation have stacks of their own, which this check of the address sanitizer does not know.
ASAN_OPTIONS=detect_stack_use_after_return=0 "$objects/test" "$rounds" "$seed"

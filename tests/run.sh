#!/usr/bin/env bash
# Runs the tests.  bash tests/run.sh [-m slow | -m gpu] [other arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
source tasks/environment.sh
# Two processes of one thread each: these models are too small for more threads.
# loadfile: tests of one file, which share something costly (a cluster, cached losses), run in one of them.
OMP_NUM_THREADS=1 exec python -m pytest -n 2 --dist loadfile -m "not slow and not gpu" "$@"

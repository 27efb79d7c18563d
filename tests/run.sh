#!/usr/bin/env bash
# Runs the tests.  bash tests/run.sh [-m slow | -m gpu] [other arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
source tasks/environment.sh
# Two processes of one thread each: these models are too small for more threads.
# loadgroup: tests of one xdist_group, which share something costly, run in one of them.
OMP_NUM_THREADS=1 exec python -m pytest -n 2 --dist loadgroup -m "not slow and not gpu" "$@"

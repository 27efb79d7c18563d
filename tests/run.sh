#!/usr/bin/env bash
# Runs the tests.  bash tests/run.sh [-m slow | -m gpu] [other arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
source tasks/environment.sh
# Three processes of one thread each, on two cores: these models are too small for more threads, and some tests wait.
# loadfile: tests of one file, which share something costly (a cluster, cached losses), run in one of them;
# long files begin first (tests/conftest.py).
OMP_NUM_THREADS=1 exec python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu" "$@"

#!/usr/bin/env bash
# Speed and fidelity of every way of scoring at the size of Stable Diffusion v1.4 and of the MSCOCO model, on a CUDA device.
# Weights, images and queries are seeded: nothing is downloaded. Needs about 40 GB of device and 12 GB of host memory.
set -euo pipefail
cd "$(dirname "$0")/.."
source tasks/environment.sh

python -m unlearn benchmark --architecture sd14 --device cuda --num_images 100 --num_exact 1 "$@"
python -m unlearn benchmark --architecture mscoco --device cuda --num_images 1000 --num_exact 1 --scaling "$@"

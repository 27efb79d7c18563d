#!/usr/bin/env bash
# Which training images made this picture? One query of the embedded emoji world, start to end, on the CPU or a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
source tasks/environment.sh

python compute_training_loss.py --task_json tasks/emoji_demo.json --dataroot data/emoji
python compute_influence.py --task_json tasks/emoji_demo.json --dataroot data/emoji

#!/usr/bin/env bash
# Builds data/emoji_shared from data/emoji and data/emoji_small: emoji on coloured squares, the UNet of emoji_small trained on them by
# `retrain`, the queries that it makes and its Fisher. Two minutes on a CPU core. VAE and text encoder are those of data/emoji/pipeline.
set -euo pipefail
cd "$(dirname "$0")/.."
source tasks/environment.sh
export OMP_NUM_THREADS=1
python -m data.emoji_builder.shared
python -m unlearn retrain full --dataroot data/emoji_shared --result_dir results/emoji_shared
cp results/emoji_shared/retrain/full-seed0/model.* data/emoji_shared/unet/
candidates=data/emoji_shared/synth/candidates
python -m unlearn generate --dataroot data/emoji_shared --overwrite --prompts tasks/emoji_shared_prompts.txt --name candidates \
    --task_json $candidates/tasks.json
python -m data.emoji_builder.shared_queries
rm -r $candidates
python -m unlearn fisher --dataroot data/emoji_shared --overwrite

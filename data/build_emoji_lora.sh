#!/usr/bin/env bash
# Builds data/emoji_lora from data/emoji and data/emoji_small: twelve small folders, a LoRA fine-tuned on each by `retrain`, and the ten
# queries that each LoRA makes. Four minutes on a CPU core. The base model is that of data/emoji_small.
set -euo pipefail
cd "$(dirname "$0")/.."
source tasks/environment.sh
export OMP_NUM_THREADS=1
python -m data.emoji_builder.lora
mkdir -p tasks/emoji_lora
for root in data/emoji_lora/*/; do
    name=$(basename "$root")
    python -m unlearn retrain full --dataroot "$root" --result_dir "results/emoji_lora/$name"
    cp "results/emoji_lora/$name/retrain/full-seed0/model.safetensors" "$root/lora.safetensors"
    python -m unlearn generate --dataroot "$root" --overwrite --prompts "$root/prompts.txt" --task_json "tasks/emoji_lora/$name.json"
done

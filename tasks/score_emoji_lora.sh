#!/usr/bin/env bash
# Scores the queries of data/emoji_lora by every method, folder by folder, and compares the scores with the gold standard of
# tasks/retrain_emoji_lora.sh. Half an hour on a CPU core. Killed and run again, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
source tasks/environment.sh
export OMP_NUM_THREADS=1
for root in data/emoji_lora/*/; do
    name=$(basename "$root")
    results=results/emoji_lora/$name
    flags="--dataroot $root --task_json tasks/emoji_lora/$name.json"
    python -m unlearn fisher --dataroot "$root"
    python compute_training_loss.py $flags --result_dir "$results"
    python compute_influence.py $flags --result_dir "$results"
    python compute_influence.py $flags --result_dir "$results/by_removal" --scoring removal
    python -m unlearn baselines $flags --result_dir "$results" --methods random pixel vae text similarity influence
    python -m unlearn baselines $flags --result_dir "$results" --methods dtrak --trak_lambda 1 --views mean
done
python -m data.emoji_builder.lora_results

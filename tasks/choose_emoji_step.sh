#!/usr/bin/env bash
# How the unlearning defaults of data/emoji/dataset.json were chosen: on models that are not reported, against the first 300
# training images. Prints a table for each setting: unlearn_lr, unlearn_steps, damping.
set -euo pipefail
cd "$(dirname "$0")/.."
source tasks/environment.sh
common=(--task_json tasks/emoji_tuning.json --dataroot data/emoji --laion_subset_size 300)

python compute_training_loss.py "${common[@]}" --result_dir results/tuning
for setting in "3e-4 1 0.1" "1e-3 1 0.1" "3e-3 1 0.1" "1e-4 10 0.1"; do
    read -r rate steps damping <<<"$setting"
    folder="results/tuning-$rate-$steps-$damping"
    mkdir -p "$folder" && cp -r results/tuning/orig_loss "$folder/"
    python compute_influence.py "${common[@]}" --result_dir "$folder" --unlearn_lr "$rate" --unlearn_steps "$steps" \
        --unlearn_grad_accum_steps $((100 / steps)) --damping "$damping" >"$folder/log" 2>&1
    echo "unlearn_lr $rate, unlearn_steps $steps, damping $damping"
    grep "moved by" "$folder/log"
    python -m unlearn evaluate "${common[@]}" --result_dir "$folder"
done

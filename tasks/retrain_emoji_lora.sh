#!/usr/bin/env bash
# The gold standard of data/emoji_lora: for each folder, LoRA fine-tuned again on random halves and without each image, and the queries'
# losses under them. Two hours on a CPU core, the first 16 halves one. Killed and run again, it goes on where it was. Usage: bash tasks/retrain_emoji_lora.sh [halves]
set -euo pipefail
cd "$(dirname "$0")/.."
source tasks/environment.sh
export OMP_NUM_THREADS=1
evidence=results/evidence/emoji_lora
for count in 16 "${1:-64}"; do
    for root in data/emoji_lora/*/; do
        name=$(basename "$root")
        flags="--dataroot $root --result_dir results/emoji_lora/$name --task_json tasks/emoji_lora/$name.json --loss_time_samples 50 --no_pictures"
        python -m unlearn retrain full $flags --output $evidence/$name/halves
        python -m unlearn retrain subsets --count $count --stack 8 $flags --output $evidence/$name/halves
        if [ $count = 16 ]; then
            python -m unlearn retrain each --stack 8 $flags --output $evidence/$name/each
        fi
    done
done

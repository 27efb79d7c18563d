#!/usr/bin/env bash
# The questions of a fine-tuner on data/emoji_lora: which images spoil a picture, which none uses, which do the same? Fine-tunes LoRA
# again without sets of images that scores chose, and without each image with another seed; compares. After tasks/retrain_emoji_lora.sh and
# tasks/score_emoji_lora.sh; half an hour on a CPU core. Killed and run again, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
source tasks/environment.sh
export OMP_NUM_THREADS=1
evidence=results/evidence/emoji_lora
python -m data.emoji_builder.lora_questions
for root in data/emoji_lora/*/; do
    name=$(basename "$root")
    results=results/emoji_lora/$name
    flags="--dataroot $root --result_dir $results --task_json tasks/emoji_lora/$name.json --loss_time_samples 50 --no_pictures"
    python -m unlearn retrain sets --sets_json "$results/sets.json" --stack 8 $flags --output $evidence/$name/sets
    if [ $name = faces ] || [ $name = hands ]; then
        python -m unlearn retrain full --seeds 1 $flags --output $evidence/$name/each-seed1
        python -m unlearn retrain each --seeds 1 --stack 8 $flags --output $evidence/$name/each-seed1
    fi
done
python -m data.emoji_builder.lora_answers

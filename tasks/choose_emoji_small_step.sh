#!/usr/bin/env bash
# How the step of unlearning and the ridge of the TRAK family were chosen for the small emoji world: by the LDS of twenty
# queries that are not among the reported ones, under the same retrained halves. Writes choose.md beside the results.
set -euo pipefail
cd "$(dirname "$0")/.."
source tasks/environment.sh
evidence=results/evidence/emoji_small
flags="--task_json tasks/emoji_small_tuning.json --dataroot data/emoji_small"
lds() { python -m unlearn evaluate $flags --result_dir "$1" --retrained $evidence/retrained --output "$1/evaluate" "${@:2}" | grep -E "^\| (ours|trak|dtrak|journeytrak) .*\(" | cut -d"|" -f2,3 | head -4; }
{
    echo "LDS (95 % interval) of 20 tuning queries. Chosen: step 0.001, lambda 0.1, the better view."
    for rate in 3e-4 1e-3 3e-3; do
        python compute_training_loss.py $flags --result_dir results/choose/step-$rate >&2
        python compute_influence.py $flags --result_dir results/choose/step-$rate --unlearn_lr $rate >&2
        echo "step $rate: $(lds results/choose/step-$rate)"
    done
    for lambda in 0.01 0.1 1; do
        for views in max mean; do
            folder=results/choose/lambda-$lambda-$views
            python -m unlearn baselines $flags --result_dir $folder --methods trak dtrak journeytrak --trak_lambda $lambda --views $views >&2
            echo "lambda $lambda, $views of the views:"
            lds $folder
        done
    done
} | tee $evidence/choose.md

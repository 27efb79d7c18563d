#!/usr/bin/env bash
# How the step of unlearning, the ridge of the TRAK family and the views were chosen for the small emoji world: by the LDS of
# twenty queries that are not among the reported ones, under the same retrained halves. Writes choose.md beside the results.
set -euo pipefail
cd "$(dirname "$0")/.."
source tasks/environment.sh
evidence=results/evidence/emoji_small
flags="--task_json tasks/emoji_small_tuning.json --dataroot data/emoji_small"

# Rows of the methods below a RESULT_DIR: method, setting, LDS of the sum as it is.
measure() {
    python -m unlearn evaluate $flags --result_dir "$1" --retrained $evidence/retrained --output "$1/evaluate" --methods ${*:3} >&2
    awk -F, -v setting="$2" 'NR > 1 { printf "| %s | %s | %.3f |\n", $1, setting, $2 }' "$1/evaluate/lds.csv"
}
{
    echo "LDS of 20 tuning queries, of the sum of the scores as it is. Chosen: step 0.001; of the others each method's highest."
    printf '\n| method | setting | LDS |\n| --- | --- | ---: |\n'
    for rate in 3e-4 1e-3 3e-3; do
        python compute_training_loss.py $flags --result_dir results/choose/step-$rate >&2
        python compute_influence.py $flags --result_dir results/choose/step-$rate --unlearn_lr $rate >&2
        measure results/choose/step-$rate "step $rate" ours
    done
    folder=results/choose/baselines  # gradients are swept once: they serve every lambda and both views
    for views in max mean; do
        python -m unlearn baselines $flags --result_dir $folder --methods influence --views $views --overwrite >&2
        measure $folder "$views of the views" influence
    done
    for lambda in 0.01 0.1 1 10; do
        for views in max mean; do
            python -m unlearn baselines $flags --result_dir $folder --methods trak dtrak journeytrak --trak_lambda $lambda --views $views --overwrite >&2
            measure $folder "lambda $lambda, $views of the views" dtrak trak journeytrak
        done
    done
} | tee $evidence/choose.md

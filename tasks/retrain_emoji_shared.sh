#!/usr/bin/env bash
# The gold standard of data/emoji_shared: scores of every method, models of random halves and full ones of three seeds, tables and plots.
# An hour and a half on a CPU core. Killed and run again, it goes on where it was; finished models that are committed in
# results/evidence/emoji_shared/retrained are not trained again. Usage: bash tasks/retrain_emoji_shared.sh [number of halves, default 64]
set -euo pipefail
cd "$(dirname "$0")/.."
source tasks/environment.sh
export OMP_NUM_THREADS=1
evidence=results/evidence/emoji_shared
root="--dataroot data/emoji_shared --result_dir results/emoji_shared"
tasks="--task_json tasks/emoji_shared.json tasks/emoji_shared_tuning.json --output $evidence/retrained"

for queries in emoji_shared emoji_shared_tuning; do
    python compute_training_loss.py --task_json tasks/$queries.json $root
    python compute_influence.py --task_json tasks/$queries.json $root
    python compute_influence.py --task_json tasks/$queries.json --dataroot data/emoji_shared --result_dir results/emoji_shared/by_removal --scoring removal --removal_timesteps 350
    python -m unlearn baselines --task_json tasks/$queries.json $root --methods random pixel vae text similarity influence
    python -m unlearn baselines --task_json tasks/$queries.json $root --methods dtrak --trak_lambda 1 --views mean
done
flags="$root $tasks --loss_time_samples 50"
python -m unlearn retrain full --seeds 0 1 2 $flags
python -m unlearn retrain subsets --count "${1:-64}" --stack 8 --no_pictures $flags

# Evaluations of the two folders of results write the scores of their methods; the last one reads them all.
evaluate="python -m unlearn evaluate --task_json tasks/emoji_shared.json --tuning_json tasks/emoji_shared_tuning.json
    --dataroot data/emoji_shared --retrained $evidence/retrained --output $evidence"
$evaluate --result_dir results/emoji_shared
$evaluate --result_dir results/emoji_shared/by_removal
$evaluate --scores $evidence/scores

#!/usr/bin/env bash
# Submits a whole benchmark to SLURM: losses, then influence, then its evaluation, each after all of the one before succeeded.
#
#   bash tasks/slurm/submit.sh tasks/all_tasks.json
#   SHARDS=40 SBATCH_FLAGS="--partition=gpu --time=12:00:00" bash tasks/slurm/submit.sh tasks/mine.json --dataroot ROOT
#
# After the task file come flags that compute_training_loss.py and compute_influence.py both take. From the environment:
#   SHARDS                 parts of the models and of the queries, each a task of one GPU (default 8; 40%10: ten at a time)
#   SBATCH_FLAGS           of sbatch, for these; SLURM's own variables, such as SBATCH_PARTITION, hold for the evaluation too
#   EVALUATE_SBATCH_FLAGS  of sbatch, for the evaluation
#   LOSSES_FLAGS INFLUENCE_FLAGS EVALUATE_FLAGS    of the programs, for one alone: LOSSES_FLAGS="--time_samples 10"
#   LOGS                   folder of the logs, one file a task (default results/logs)
# Where something failed or was cancelled, the same command goes on: what is finished is kept, its tasks end in seconds.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tasks/environment.sh
[ -f "${1-}" ] || { echo "usage: bash tasks/slurm/submit.sh TASK_JSON [FLAGS]; found no such file: ${1-}" >&2; exit 2; }
tasks=(--task_json "$1")
shift
logs=${LOGS:-results/logs}
mkdir -p "$logs" # SLURM does not make it, and a job without its log fails without a word

# The evaluation knows only some of the flags.
known=()
flags=("$@")
for number in "${!flags[@]}"; do
    case ${flags[number]} in
        --dataroot | --result_dir | --sd_version | --laion_subset_size | --vae_batch_size | --precision)
            known+=("${flags[number]}" "${flags[number + 1]-}")
            ;;
        --dataroot=* | --result_dir=* | --sd_version=* | --laion_subset_size=* | --vae_batch_size=* | --precision=*)
            known+=("${flags[number]}")
            ;;
    esac
done

# Prints the job's number. One whose predecessor failed is cancelled: it would stand in the queue for ever.
submit() {
    local number
    number=$(sbatch --parsable --kill-on-invalid-dep=yes "$@")
    echo "${number%%;*}" # NUMBER;CLUSTER where there are several
}

# Unquoted: these are lists of flags.
array="--array=1-${SHARDS:-8} --output=$logs/%x-%A_%a.out ${SBATCH_FLAGS-}"
losses=$(submit $array tasks/slurm/losses.sbatch "${tasks[@]}" "$@" ${LOSSES_FLAGS-})
influence=$(submit $array --dependency="afterok:$losses" tasks/slurm/influence.sbatch "${tasks[@]}" "$@" ${INFLUENCE_FLAGS-})
evaluate=$(submit --output="$logs/%x-%j.out" --dependency="afterok:$influence" ${EVALUATE_SBATCH_FLAGS-} tasks/slurm/evaluate.sbatch \
    "${tasks[@]}" "${known[@]}" ${EVALUATE_FLAGS-})
echo "losses $losses, influence $influence, evaluate $evaluate; logs: $logs"

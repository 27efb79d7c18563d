# What the array jobs share; to be sourced at the root. submit.sh has made the environment .venv: tasks of one array would all
# make it at once.
export PATH="$PWD/.venv/bin:$PATH" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

# run_part SCRIPT FLAGS...  runs the part of this task of the array. A program that ends with 75 was asked to end (the time is
# nearly up) and has finished the piece at hand: the task goes back into the queue, to go on where it was. So it does after
# 138, SIGUSR1 before the program had loaded enough to listen. Everything else is the task's own end: 0, or an error, which
# another run would only meet again.
run_part() {
    local status=0
    # srun has not taken over --cpus-per-task by itself since SLURM 22.05.
    srun --cpus-per-task="$SLURM_CPUS_PER_TASK" python "$@" --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" || status=$?
    # The limit is for a task that is stopped again and again before its first piece of work, because its time is too short.
    if { [ "$status" = 75 ] || [ "$status" = 138 ]; } && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then
        # Not $SLURM_JOB_ID: that of an array's last task is the number of the whole array.
        scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" && sleep 60 # until SLURM ends this run
    fi
    return "$status"
}

# What slurm_fsdp.sbatch and slurm_zero.sbatch share: they source it with the name of the engine, the recipe and its
# options. One torchrun on every node starts one process for each GPU; they meet on the first node of the job.

. "$REPOSITORY/launch/supervise.sh"
recipe=${2:?name a recipe, or a YAML file}
options=(--engine.kind "$1" "${@:3}")
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
check "$((SLURM_JOB_NUM_NODES * PROCS))" "$recipe" "${options[@]}"
share_cores "$PROCS"
keep_logs

# SLURM signals all processes of the step: torchrun, which then gives its workers STOP_S seconds, and the workers too.
# A node that fails ends the others. srun does not take the cores of a task over from sbatch.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$STOP_S
code=0
supervise srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    bash -c 'exec torchrun --node-rank "$SLURM_NODEID" "$@"' torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$PROCS" \
    --master-addr "${nodes%%$'\n'*}" --master-port "$MASTER_PORT" --rdzv-id "$SLURM_JOB_ID" \
    --log-dir "$logs" --tee 3 -m lrpretrain.pretrain --config "$recipe" "${options[@]}" || code=$?

# A run that was stopped goes on in the same job, unless SLURM is ending that: one that was cancelled stays so, and one
# that was preempted SLURM queues by itself.
if [ "$code" -eq 75 ] && [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

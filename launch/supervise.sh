# What the scripts that start a training share; they source it. The launcher runs in a process group of its own,
# signals to the script reach the training, and the script ends with the exit code of the training.

# Where lrpretrain is not on the path, it is taken from .venv.
command -v lrpretrain >/dev/null || PATH=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH

# Print the comment at the top of the script.
explain() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# Check a recipe for so many processes: check PROCS RECIPE [OPTION …]. Sets `run` to its run folder. What is wrong is
# said here, with its exit code, because torchrun returns 1 for any failure.
check() { run=$(lrpretrain show "$2" --procs "$1" --field run.dir "${@:3}") || exit; }

# Give each of so many processes on this node its share of the cores.
share_cores() {
    local threads=$(($(nproc) / $1))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads < 1 ? 1 : threads > 4 ? 4 : threads))}
}

# Set `logs` to a new folder in the run folder, for what processes print, and for their last collectives: one that
# hangs fails after engine.timeout_s, and then all of them write down what they were at.
keep_logs() {
    logs=$run/logs/$(date +%Y%m%d-%H%M%S)
    mkdir -p "$logs"
    export TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_FR_DUMP_TEMP_FILE=$logs/collectives_
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
    export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[${rank}] '
}

# Run a launcher until its whole process group has ended: supervise COMMAND …. Returns the exit code that the run left
# in status.json; without any the launcher's, or 75 where a signal came before the training began.
supervise() {
    local before code=0 recorded='' asked='' signal
    before=$(written)
    set -m # a process group for each job
    "$@" &
    launcher=$!
    for signal in TERM INT HUP USR1; do trap "forward $signal" "$signal"; done
    wait "$launcher" || code=$?
    while kill -0 "$launcher" 2>/dev/null; do # a signal interrupted the wait
        code=0
        wait "$launcher" || code=$?
    done
    while kill -0 -- "-$launcher" 2>/dev/null; do sleep 0.2; done
    if [ "$(written)" != "$before" ]; then
        recorded=$(sed -n 's/^ *"exit_code": \([0-9]*\),\{0,1\}$/\1/p' "$run/status.json")
    elif [ "$code" -ne 0 ]; then
        recorded=$asked
    fi
    return "${recorded:-$code}"
}

# Say when status.json was written.
written() { stat --format '%i %y' "$run/status.json" 2>/dev/null || :; }

# Pass a signal on to the workers alone, which torchrun and deepspeed would kill 30 s after a signal of their own,
# checkpoint or not. They are children of torchrun, and in the group of deepspeed. Where there are none yet, or none on
# this machine, the launcher is told to end.
forward() {
    local workers=' -u -m lrpretrain[.]pretrain '
    asked=75
    pkill "-$1" --parent "$launcher" --full -- "$workers" ||
        pkill "-$1" --pgroup "$launcher" --full -- "$workers" ||
        kill -TERM -- "-$launcher" 2>/dev/null || :
}

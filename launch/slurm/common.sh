# What all Slurm templates share: the ranks' environment, how they find each other, and what happens
# shortly before the time limit. Sourced, never run.
#
#     sbatch [--nodes=N] launch/slurm/STAGE.sbatch --config RECIPE.yaml [--dotted.key value ...]
#
# Submit from the root of the checkout on a file system that all nodes share; that checkout is the
# code that runs. A site's own account, partition and time limit are best set once in the
# environment (SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT), and with them:
#
#     MINITRON_IMAGE   container image for pyxis, e.g. /images/minitron.sqsh; without one the ranks
#                      run in the checkout's .venv (make setup)
#     MINITRON_MOUNTS  what the container sees beside the checkout, e.g. /models:/models,/data:/data
#     MINITRON_CACHE   where text is tokenised to, a directory that all nodes see; by default .cache in
#                      the checkout, for a container's home is its own
#     RANKS_PER_NODE   ranks of a node; by default one for each GPU that Slurm gave, else one
#
# shellcheck shell=bash
set -euo pipefail

: "${SLURM_JOB_ID:?not in a Slurm job; submit this script with sbatch}"
cd "$SLURM_SUBMIT_DIR"

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
export MINITRON_CACHE="${MINITRON_CACHE:-$PWD/.cache}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
# One hardware queue keeps tensor-parallel communication and computation in the order they are
# issued in, which is what lets them overlap (up to Hopper).
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# What a rank has to end in after a signal, before torchrun kills it: time for the step under way and
# a checkpoint. Stays below the 300 s of `#SBATCH --signal`; torchrun itself gives 30 s.
export PET_SHUTDOWN_TIMEOUT="${PET_SHUTDOWN_TIMEOUT:-240}"

die() {
    echo "error: $*" >&2
    exit 2
}

# run_stage STAGE [ARGUMENT ...]: run launch/STAGE.py on every rank of the job.
run_stage() {
    local stage=$1
    shift
    run_step "launch/$stage.py" "$@"
}

# run_step SCRIPT [ARGUMENT ...]: run a stage's script on every rank; returns if it succeeds, so that
# a job can run several.
#
# Near the time limit Slurm sends USR1 to this shell. It goes on to srun, which hands it to every
# torchrun and so to the ranks; training ones finish their step, save a checkpoint and end. A job that
# ends in an error after that goes back into the queue under its own number, and a stage that is given
# --resume continues where it was. The exit status cannot tell a stopped run from a failed one
# (torchrun exits 1 either way), whether the signal came can: an error without it is final. Where jobs
# are preempted, PreemptParameters=send_user_signal sends them the same signal, and GraceTime is their
# time to save; ranks take SIGTERM for the same.
run_step() {
    [[ -z "$signalled" ]] || requeue
    [[ -f "$1" ]] || die "no $1 in $PWD; submit from the checkout's root"

    local nodes ranks head port
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    head=${nodes[0]}
    ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    port=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node do not meet

    local -a step=(srun --nodes="${#nodes[@]}" --ntasks-per-node=1 --kill-on-bad-exit=1)
    if [[ -n "${MINITRON_IMAGE:-}" ]]; then
        step+=(
            --container-image="$MINITRON_IMAGE"
            --container-mounts="$PWD:$PWD${MINITRON_MOUNTS:+,$MINITRON_MOUNTS}"
            --container-workdir="$PWD"
            --no-container-mount-home
        )
    elif [[ -x .venv/bin/torchrun ]]; then
        PATH="$PWD/.venv/bin:$PATH"
    else
        die "MINITRON_IMAGE is not set and $PWD/.venv/bin/torchrun does not exist; run make setup"
    fi
    step+=(
        torchrun
        --nnodes="${#nodes[@]}"
        --nproc-per-node="$ranks"
        --rdzv-backend=c10d
        --rdzv-id="$SLURM_JOB_ID"
        --rdzv-endpoint="$head:$port"
        # USR1 is not among torchrun's defaults: it would die of it and leave the ranks behind.
        --signals-to-handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
        "$@"
    )
    echo "$(date -u +%FT%TZ) job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): ${step[*]}"

    local status
    "${step[@]}" &
    step_pid=$!
    # A signal may have come before there was a step to pass it on to.
    [[ -z "$signalled" ]] || kill -USR1 "$step_pid" 2>/dev/null || true
    # A trapped signal ends `wait` early; only the step's own end ends this loop.
    while
        status=0
        wait "$step_pid" || status=$?
        kill -0 "$step_pid" 2>/dev/null
    do :; done
    step_pid=""

    [[ "$status" -ne 0 ]] || return 0
    [[ -z "$signalled" ]] || requeue
    exit "$status"
}

signalled="" step_pid=""
trap 'signalled=1; [[ -z "$step_pid" ]] || kill -USR1 "$step_pid" 2>/dev/null || true' USR1

requeue() {
    echo "$(date -u +%FT%TZ) stopped before the time limit; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}

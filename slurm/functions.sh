# Sourced by every script here, behind environment.sh.

# refuse TEXT: one line, exit code 2.
refuse() {
    echo "error: $*" >&2
    exit 2
}

# on_this_host WORDS...: Python on this host, in the wrapper where there is one: the checks before a job or its ranks.
on_this_host() {
    # shellcheck disable=SC2086  # the wrapper is words
    $RPSD_WRAPPER "${RPSD_HOST_PYTHON:-$PYTHON}" "$@"
}

# alone WORDS...: Python as the job's only process, on its first node.
alone() {
    # shellcheck disable=SC2086  # options and the wrapper are words
    srun --nodes=1 --ntasks=1 --cpu-bind=none $RPSD_SRUN_OPTIONS bash -c 'exec $RPSD_WRAPPER "$PYTHON" "$@"' alone "$@"
}

# torchrun_nodes NODES RANKS WORDS...: torchrun with WORDS, one task a node and RANKS ranks under each. It replaces the
# shell that it runs in, so that signals reach srun: call it with & or in ( ).
torchrun_nodes() {
    local nodes="$1" ranks="$2" master port=$((20000 + SLURM_JOB_ID % 20000))
    shift 2
    master="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    # --cpu-bind=none: all ranks of a node belong to one task, which may use all of the job's cores there.
    # shellcheck disable=SC2086  # options are words
    exec srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
        $RPSD_SRUN_OPTIONS bash -c '
            exec $RPSD_WRAPPER "$PYTHON" -m torch.distributed.run --nnodes="$1" --node-rank="$SLURM_NODEID" \
                --nproc-per-node="$2" --master-addr="$3" --master-port="$4" "${@:5}"
        ' launcher "$nodes" "$ranks" "$master" "$port" "$@"
}

# queue WORDS...: sbatch; prints the job's number. A job whose dependency can never be met is cancelled.
queue() {
    local answer said code=0
    said="$(mktemp)" # a cluster's own remarks go there, too
    answer="$(sbatch --parsable --kill-on-invalid-dep=yes "$@" 2>"$said")" || code=2
    if [ "$code" = 0 ]; then
        cat "$said" >&2
        answer="${answer##*$'\n'}"
        echo "${answer%%;*}"
    else
        echo "error: sbatch refuses $*: $(tr '\n' ' ' <"$said")" >&2
    fi
    rm -f "$said"
    return "$code"
}

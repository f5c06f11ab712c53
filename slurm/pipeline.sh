#!/bin/bash
# Import, train, export and evaluate as jobs that wait for each other.
#
#   slurm/pipeline.sh [--wait] RUN SETTINGS     # check all, queue what is not done yet; --wait: until its end
#   slurm/pipeline.sh --wait RUN                # wait for a pipeline that is queued
#
# SETTINGS is TOML (docs/clusters.md). Every step is checked here first; bad input is one line, exit code 2, and nothing
# is queued. A step that fails cancels those behind it; the last job always runs, writes RUN/pipeline.json and fails
# with the reason. --wait exits with 0 where the report is there, else with 1.
set -uo pipefail

RPSD_ROOT="${RPSD_ROOT:-$(cd "$(dirname "$0")/.." && pwd)}"
export RPSD_ROOT
cd "$RPSD_ROOT" && source slurm/environment.sh && source slurm/functions.sh || exit 2

waits=
[ "${1:-}" != --wait ] || { waits=yes; shift; }
[ $# = 2 ] || { [ $# = 1 ] && [ -n "$waits" ]; } || refuse "usage: slurm/pipeline.sh [--wait] RUN SETTINGS"
run="$1"

last_job() { sed -n 's/.*"last_job": \([0-9]*\).*/\1/p' "$run/pipeline.json" 2>/dev/null; }

# in_queue JOB: whether Slurm has it waiting or running; an answer that does not come is asked for again.
in_queue() {
    local states
    until states="$(squeue --noheader --jobs "$1" --format %T 2>&1)"; do
        case "$states" in *"Invalid job id"*) return 1 ;; esac
        sleep "${RPSD_POLL_SECONDS:-10}"
    done
    [ -n "$states" ]
}

if [ $# = 2 ]; then
    last="$(last_job)"
    [ -z "$last" ] || ! in_queue "$last" || refuse "a pipeline of $run is queued already, its last job is $last"
    plan="$(on_this_host slurm/pipeline.py plan "$run" "$2")" || exit 2
    plan="$(sed -n 's/^job //p' <<<"$plan")" # without what a library says
    mkdir -p "$run/logs" "$run/ruler/parts" || exit 2 # where Slurm writes the logs
    declare -A jobs=()
    queued=()
    hold=(--hold) # nothing begins before all are queued
    while IFS= read -r line; do
        eval "words=($line)" # quoted by shlex.join
        name="${words[0]}" needs="${words[1]}" after=()
        if [ "$needs" != - ]; then
            numbers=
            IFS=: read -ra names <<<"${needs#*:}"
            for one in "${names[@]}"; do numbers+=":${jobs[$one]}"; done
            after=(--dependency "${needs%%:*}$numbers")
        fi
        jobs[$name]="$(queue "${hold[@]}" "${after[@]}" "${words[@]:2}")" || {
            [ ${#queued[@]} = 0 ] || scancel "${queued[@]#*=}"
            exit 2
        }
        hold=()
        queued+=("$name=${jobs[$name]}")
        echo "$name: job ${jobs[$name]}"
    done <<<"$plan"
    on_this_host slurm/pipeline.py queued "$run" "${queued[@]}" || { scancel "${jobs[@]}"; exit 2; }
    scontrol release "${queued[0]#*=}" || { scancel "${jobs[@]}"; exit 2; }
    echo "report: $run/ruler/report.html, state and reasons: $run/pipeline.json"
fi
[ -n "$waits" ] || exit 0
last="$(last_job)"
[ -n "$last" ] || refuse "$run has no pipeline.json: nothing was queued"
while in_queue "$last"; do sleep "${RPSD_POLL_SECONDS:-10}"; done
on_this_host slurm/pipeline.py result "$run"

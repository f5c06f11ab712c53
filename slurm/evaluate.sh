#!/bin/bash
# An evaluation as a Slurm array, a job for every task and length, and a last one that makes the report.
#
#   slurm/evaluate.sh --gpus-per-node 1 --time 4:00:00 -- --hf models/a --tasks all --lengths 4096 8192 --output runs/a
#
# Before --: options of sbatch, for all jobs. Behind it: those of tools/evaluate.py. They are checked here; bad ones are
# one line, exit code 2, and nothing is queued. RPSD_CONCURRENT: the most parts at once. Parts that are whole are not
# queued again, so the same command goes on after a failure; the last job fails and names the parts that are not.
set -uo pipefail

RPSD_ROOT="${RPSD_ROOT:-$(cd "$(dirname "$0")/.." && pwd)}"
export RPSD_ROOT
cd "$RPSD_ROOT" && source slurm/environment.sh && source slurm/functions.sh || exit 2

options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    options+=("$1")
    shift
done
[ $# -gt 1 ] || refuse "usage: slurm/evaluate.sh SBATCH_OPTIONS... -- OPTIONS OF tools/evaluate.py"
shift

output=
for ((place = 1; place <= $#; place++)); do
    following=$((place + 1))
    case "${!place}" in
        --output=*) output="${!place#--output=}" ;;
        --output) output="${!following:-}" ;;
    esac
done
left="$(on_this_host tools/evaluate.py "$@" --list-parts)" || exit 2
left="$(sed -n '/^[0-9]* [^ ]*$/p' <<<"$left")" # without what a library says
after=()
if [ -n "$left" ]; then
    mkdir -p "$output/parts" || exit 2 # where Slurm writes the logs
    parts="$(cut -d ' ' -f 1 <<<"$left" | paste -sd ,)${RPSD_CONCURRENT:+%$RPSD_CONCURRENT}"
    array="$(queue --array "$parts" --output "$output/parts/%a.log" "${options[@]}" slurm/evaluate.sbatch "$@")" || exit 2
    echo "parts: job $array, $(wc -l <<<"$left") of them, logs in $output/parts"
    after=(--dependency "afterany:$array")
fi
last="$(queue "${after[@]}" --output "$output/report-%j.log" "${options[@]}" slurm/evaluate.sbatch "$@")" || {
    [ -z "$left" ] || scancel "$array"
    exit 2
}
echo "report: job $last, $output/report-$last.log, then $output/report.html"

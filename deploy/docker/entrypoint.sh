#!/usr/bin/env bash
# The container's main process. Flags are server.py's, with --tp NP unless it is given. It starts NP ranks (default: a
# rank for each GPU, or one), on the HOSTS (host:ranks,…; default: here), passes SIGTERM and SIGINT on to them, so that
# they drain, and ends with mpirun's exit code. Anything else is run in its place:
#
#     docker run … IMAGE --hf-model-name gpt2
#     docker run … IMAGE ./client.py --url http://host:8000 --prompts "Thank you for"
#
# mpirun itself kills its ranks a second after a SIGTERM, so it must not get it.
set -euo pipefail

if [ $# -gt 0 ] && [[ $1 != -* ]]; then exec "$@"; fi

shopt -s nullglob
gpus=(/dev/nvidia[0-9]*)
np=${NP:-${#gpus[@]}}
np=$((np > 0 ? np : 1))
args=(--bind-to none --oversubscribe -n "$np")
if [ "$(id -u)" -eq 0 ]; then args+=(--allow-run-as-root); fi
if [ -n "${HOSTS:-}" ]; then
  args+=(-H "$HOSTS")
  for name in PATH VIRTUAL_ENV HF_HOME HF_TOKEN FT_REPO_DIR ${!NCCL_*} ${!OMP_*}; do # the others get nothing by themselves
    if [ -n "${!name:-}" ]; then args+=(-x "$name"); fi
  done
fi
# A session of its own: a terminal's Ctrl-C would reach mpirun, too.
setsid mpirun "${args[@]}" ./server.py --tp "$np" --output-dir "$OUTPUT_DIR" "$@" &
mpirun=$!

# Only ranks get the signal: the children of mpirun are also what connects it to other hosts.
# shellcheck disable=SC2317 # the trap calls it
drain() {
  local pid children=() ranks=()
  is_interrupted=true
  read -ra children <"/proc/$mpirun/task/$mpirun/children" || true # there is no line's end
  for pid in "${children[@]}"; do
    if grep -q server.py "/proc/$pid/cmdline" 2>/dev/null; then ranks+=("$pid"); fi
  done
  kill -TERM "${ranks[@]:-$mpirun}" 2>/dev/null || true
}
trap drain TERM INT

is_interrupted=true
while $is_interrupted; do # a signal ends wait, and not mpirun
  is_interrupted=false code=0
  wait "$mpirun" || code=$?
done
exit "$code"

# Functions of the job scripts beside this file, which read them from the clone.

# Nodes of a list such as node[1-3], one per line.
nodes_of() { scontrol show hostnames "$1"; }

# The job's end must be further away than the signal before it: else the signal comes at once, and the job would be
# requeued for ever.
check_time_left() {
  local end left
  end=$(date --date "$(squeue --noheader --format %e --jobs "$SLURM_JOB_ID")" +%s 2>/dev/null) || return 0 # unlimited
  left=$((end - $(date +%s)))
  if ((left <= SIGNAL_SECONDS)); then
    echo "job: --time leaves $left s, which SIGNAL_SECONDS=$SIGNAL_SECONDS uses up; raise --time" >&2
    exit 1
  fi
}

# train NODELIST OPTION... : one process per GPU. When one has ended, the others have WAIT_SECONDS to end by themselves,
# so that their exit codes are their own; the largest is that of the step.
train() {
  local nodelist=$1
  shift
  local nodes
  mapfile -t nodes < <(nodes_of "$nodelist")
  export PYTHON MASTER_ADDR=${nodes[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CPUS_PER_PROCESS < 8 ? CPUS_PER_PROCESS : 8))}
  srun "${TRAIN_FLAGS[@]}" --nodelist "$nodelist" --nodes "${#nodes[@]}" \
    --ntasks $((${#nodes[@]} * PROCESSES_PER_NODE)) --ntasks-per-node "$PROCESSES_PER_NODE" \
    --cpus-per-task "$CPUS_PER_PROCESS" --kill-on-bad-exit=0 --wait "$WAIT_SECONDS" \
    "${CONTAINER_FLAGS[@]}" "${LAUNCHER[@]}" \
    bash -c 'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
      export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
      exec "$PYTHON" tools/train_zppo.py "$@"' _ "$@"
}

# serve NODELIST: SERVER_COMMAND on every node, in the background, until all of them are healthy.
serve() {
  local node nodes
  mapfile -t nodes < <(nodes_of "$1")
  export PYTHON SERVER_PORT
  srun "${SERVER_FLAGS[@]}" --nodelist "$1" --nodes "${#nodes[@]}" --ntasks "${#nodes[@]}" --ntasks-per-node 1 \
    --kill-on-bad-exit=1 bash -c "$SERVER_COMMAND" &
  SERVER_STEP=$!
  trap 'kill "$SERVER_STEP" 2>/dev/null' EXIT
  for node in "${nodes[@]}"; do
    until curl --silent --fail --output /dev/null "http://$node:$SERVER_PORT$SERVER_HEALTH"; do
      kill -0 "$SERVER_STEP" 2>/dev/null || return 1
      sleep 2
    done
  done
}

# urls_of NODELIST: the servers' addresses as an option's value.
urls_of() {
  local node urls=()
  for node in $(nodes_of "$1"); do urls+=("http://$node:$SERVER_PORT$SERVER_PATH"); done
  local IFS=,
  echo "[${urls[*]}]"
}

# code_with_servers EXIT_CODE: a run that has lost its servers is continued with new ones.
code_with_servers() {
  if (($1 == 1)) && ! kill -0 "$SERVER_STEP" 2>/dev/null; then
    echo 69
  else
    echo "$1"
  fi
}

# end EXIT_CODE: the job ends with the run, or is requeued to continue it.
end() {
  case $1 in
    0) exit 0 ;;
    1 | 2) exit "$1" ;; # an error that a restart would repeat
    75) echo "job: the run asks to be continued" ;;
    *) echo "job: a process failed with exit code $1" ;;
  esac
  if ((${SLURM_RESTART_COUNT:-0} >= MAX_RESTARTS)); then
    echo "job: not requeued, after $MAX_RESTARTS restarts" >&2
    exit "$1"
  fi
  # A cancelled job is on its way out and must not come back.
  if [[ $(squeue --noheader --format %T --jobs "$SLURM_JOB_ID") != RUNNING ]]; then
    exit "$1"
  fi
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60 # Slurm ends this script, and starts the job again after two minutes at the earliest
}

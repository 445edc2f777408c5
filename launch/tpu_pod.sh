#!/usr/bin/env bash
# Trains on one slice of Cloud TPU VMs: requests it, starts the training on every worker, resumes after preemption.
#
#   launch/tpu_pod.sh create  --name=NAME --zone=ZONE --accelerator-type=TYPE [--spot]
#   launch/tpu_pod.sh install --name=NAME --zone=ZONE
#   launch/tpu_pod.sh run     --name=NAME --zone=ZONE [--bucket=BUCKET] -- --config=FILE --workdir=/mnt/bucket/RUN ...
#   launch/tpu_pod.sh log     --name=NAME --zone=ZONE      follow the first worker's log; Ctrl-C stops only the log
#   launch/tpu_pod.sh status  --name=NAME --zone=ZONE      the slice's state and each worker's last line
#   launch/tpu_pod.sh resume  all flags of create and run  do what is missing of create, install and run
#   launch/tpu_pod.sh delete  --name=NAME --zone=ZONE
#
# Every command also takes --project=PROJECT and --dry-run, which prints the commands and runs none; create and resume
# take --service-account=EMAIL, --network=NETWORK and --subnetwork=SUBNETWORK. Flags that a command does not use are
# ignored, so one set of flags serves all. LIBTPU_INIT_ARGS is passed to the workers if it is set here.
#
# Exit codes: 0 done, 1 failed, 2 a mistake in the command line. docs/tpu.md explains every step.

# The commands for the workers are in single quotes because the workers' shells expand them.
# shellcheck disable=SC2016,SC2088
set -euo pipefail

readonly POLL_SECONDS=${POLL_SECONDS:-30}
readonly MOUNT=/mnt/bucket
readonly RUNNING_ALREADY=9 # what a worker's shell returns if a training runs there
readonly NOT_INSTALLED=8
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly repository

fail() { # exit code, message
  printf 'error: %s\n' "$2" >&2
  exit "$1"
}

# Prints the words as one line that a shell parses into the same words.
quoted() {
  local word line="" quote="'" escaped="'\\''"
  for word in "$@"; do
    case $word in
      "" | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//$quote/$escaped}'" ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

# Prints the command, and runs it unless this is a dry run.
call() {
  if [[ -n $dry_run ]]; then
    printf '%s\n' "$(quoted "$@")"
  else
    printf '+ %s\n' "$(quoted "$@")" >&2
    "$@"
  fi
}

# --- The slice ---

# Sets `state` to the queued resource's state, or to NOT_FOUND. A dry run sets it to the argument.
read_state() {
  state=$1
  local describe=(gcloud compute tpus queued-resources describe "$name" "${location[@]}" '--format=value(state.state)')
  if [[ -n $dry_run ]]; then
    call "${describe[@]}"
    return
  fi
  local messages
  messages=$(mktemp)
  if ! state=$(call "${describe[@]}" 2>"$messages"); then
    # Any other error may be a lost login or connection, after which nothing may be deleted or created.
    if ! grep -q NOT_FOUND "$messages"; then
      cat "$messages" >&2
      rm -f "$messages"
      fail 1 "the state of $name cannot be read; the message of gcloud is above"
    fi
    state=NOT_FOUND
  fi
  grep '^+ ' "$messages" >&2 || true
  rm -f "$messages"
}

wait_until_active() {
  while true; do
    read_state ACTIVE
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | NOT_FOUND)
        fail 1 "$name is $state; 'resume' requests it again" ;;
      *) # in the queue: CREATING, ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING
        printf '%s is %s; waiting\n' "$name" "$state" >&2
        sleep "$POLL_SECONDS" ;;
    esac
  done
}

create() {
  local options=("--node-id=$name" "${location[@]}" "--accelerator-type=$accelerator_type")
  options+=("--runtime-version=$(runtime_version)")
  if [[ -n $spot ]]; then options+=(--spot); fi
  if [[ -n $service_account ]]; then options+=("--service-account=$service_account"); fi
  if [[ -n $network ]]; then options+=("--network=$network"); fi
  if [[ -n $subnetwork ]]; then options+=("--subnetwork=$subnetwork"); fi
  call gcloud compute tpus queued-resources create "$name" "${options[@]}"
  wait_until_active
}

delete() {
  # --force also deletes the node, --quiet asks nothing.
  call gcloud compute tpus queued-resources delete "$name" "${location[@]}" --force --quiet
}

# Prints the image that Google recommends for JAX on each generation.
runtime_version() {
  case $accelerator_type in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
  esac
}

# --- The workers ---

on_workers() { # workers, command
  call gcloud compute tpus tpu-vm ssh "$name" "${location[@]}" "--worker=$1" "--command=$2"
}

# After a reboot, another process may have this process id.
readonly IS_RUNNING='grep -qsa clip_jax /proc/$(cat ~/clip_jax.pid 2>/dev/null || echo none)/cmdline'
readonly REFUSE_IF_RUNNING="if $IS_RUNNING; then echo \"a training runs on \$(hostname)\"; exit $RUNNING_ALREADY; fi"

install() {
  local archive="${TMPDIR:-/tmp}/clip_jax-$name.tar.gz" command
  # The last commit, not the working tree, so that the trained code can be found again.
  call git -C "$repository" archive --format=tar.gz "--output=$archive" HEAD
  call gcloud compute tpus tpu-vm scp "$archive" "$name:clip_jax.tar.gz" "${location[@]}" --worker=all
  command="$REFUSE_IF_RUNNING; set -e; "
  command+='rm -rf ~/clip_jax; mkdir ~/clip_jax; tar -xzf ~/clip_jax.tar.gz -C ~/clip_jax; cd ~/clip_jax; '
  # The image's Python is 3.10, too old; uv installs a newer one.
  command+='test -x ~/.local/bin/uv || curl -LsSf https://astral.sh/uv/install.sh | sh; '
  command+='~/.local/bin/uv venv --quiet --python=3.12 .venv; '
  command+='~/.local/bin/uv pip install --quiet --python=.venv/bin/python --constraint=constraints.txt '
  command+='--editable ".[tpu]"'
  on_workers all "$command"
}

# Prints the command that mounts the bucket where it isn't mounted, such as after a worker was restarted in place.
mount_command() {
  printf '%s' "mountpoint -q $MOUNT || { set -e; command -v gcsfuse >/dev/null || { "
  printf '%s' 'curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg'
  printf '%s' ' | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null; '
  printf '%s' 'echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt '
  printf '%s' 'gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null; '
  # The updates of a new VM hold the lock for a while.
  printf '%s' 'sudo apt-get -o DPkg::Lock::Timeout=600 update -qq; '
  printf '%s' 'sudo apt-get -o DPkg::Lock::Timeout=600 install -y -qq gcsfuse; }; '
  printf '%s' "sudo mkdir -p $MOUNT; sudo chown \"\$(id -u):\$(id -g)\" $MOUNT; "
  # No cached metadata: each host must immediately see what the others wrote. A checkpoint becomes valid by
  # renaming its folder, which gcsfuse refuses in a bucket without hierarchical namespace unless a limit is given.
  printf '%s' 'gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 '
  printf '%s' "--metadata-cache-negative-ttl-secs=0 $bucket $MOUNT; }"
}

# Mounts the bucket; the exit code states whether the workers are ready to run.
prepare() {
  local command="$REFUSE_IF_RUNNING; "
  command+="test -x ~/clip_jax/.venv/bin/python || { echo 'not installed'; exit $NOT_INSTALLED; }"
  if [[ -n $bucket ]]; then command+="; $(mount_command)"; fi
  on_workers all "$command"
}

# Starts the training on all workers, detached from the ssh session: a dropped connection ends nothing.
start() {
  local command='cd ~/clip_jax || exit 1; '
  if [[ -n ${LIBTPU_INIT_ARGS:-} ]]; then command+="export LIBTPU_INIT_ARGS=$(quoted "$LIBTPU_INIT_ARGS"); "; fi
  command+="nohup bash -c 'date; .venv/bin/python -m clip_jax.main --distributed \"\$@\"; echo \"exit code \$?\"' "
  command+="clip_jax $(quoted "${training[@]}") >> ~/clip_jax.log 2>&1 < /dev/null & echo \$! > ~/clip_jax.pid"
  on_workers all "$command"
}

run() {
  # All workers are checked before any is started: half a pod would wait for the other half until it times out.
  prepare || fail 1 "$name is not ready to run; its message is above"
  start
}

follow_log() {
  on_workers 0 'tail -n 100 -F ~/clip_jax.log'
}

status() {
  read_state ACTIVE
  if [[ -z $dry_run ]]; then printf '%s is %s\n' "$name" "$state"; fi
  if [[ $state == ACTIVE ]]; then
    on_workers all "if $IS_RUNNING; then echo running; else echo 'not running'; fi; tail -n 1 ~/clip_jax.log"
  fi
}

resume() {
  read_state SUSPENDED # a dry run shows the longest case: the slice was preempted
  while [[ $state == SUSPENDING || $state == DELETING ]]; do
    printf '%s is %s; waiting\n' "$name" "$state" >&2
    sleep "$POLL_SECONDS"
    read_state SUSPENDED
  done
  local code=0
  case $state in
    ACTIVE)
      prepare || code=$?
      if [[ $code == "$RUNNING_ALREADY" ]]; then
        printf 'nothing to resume\n' >&2
        return
      elif [[ $code == "$NOT_INSTALLED" ]]; then
        install
      elif [[ $code == 0 ]]; then
        start
        return
      else
        fail 1 "$name is ACTIVE, but cannot be reached or made ready; its message is above"
      fi ;;
    SUSPENDED | FAILED) # neither recovers by itself, and the name is in use until it is deleted
      delete
      create
      install ;;
    NOT_FOUND)
      create
      install ;;
    *)
      wait_until_active
      install ;;
  esac
  run
}

# --- The command line ---

name="" zone="" project="" accelerator_type="" spot="" bucket="" service_account="" network="" subnetwork="" dry_run=""
training=()
commands="create, install, run, log, status, resume, delete"
[[ $# -gt 0 ]] || fail 2 "no command; give one of $commands"
command=$1
shift
case $command in
  create | install | run | log | status | resume | delete) ;;
  -h | --help)
    sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0 ;;
  *) fail 2 "unknown command $command; give one of $commands" ;;
esac
while [[ $# -gt 0 ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --accelerator-type=*) accelerator_type=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --service-account=*) service_account=${1#*=} ;;
    --network=*) network=${1#*=} ;;
    --subnetwork=*) subnetwork=${1#*=} ;;
    --spot) spot=yes ;;
    --dry-run) dry_run=yes ;;
    --)
      shift
      training=("$@")
      break ;;
    --name | --zone | --project | --accelerator-type | --bucket | --service-account | --network | --subnetwork)
      fail 2 "$1 has no value; write $1=VALUE" ;;
    *) fail 2 "unknown argument $1; write arguments of the training after --" ;;
  esac
  shift
done

[[ -n $name ]] || fail 2 "--name=NAME is missing: a name for the slice"
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
  fail 2 "--name=$name must be lowercase letters, digits and hyphens, starting with a letter"
[[ -n $zone ]] || fail 2 "--zone=ZONE is missing, such as --zone=us-west4-a"
[[ $bucket =~ ^([a-z0-9][a-z0-9._-]*)?$ ]] ||
  fail 2 "--bucket=$bucket must be the name of a bucket, without gs:// or folders"
if [[ $command == create || $command == resume ]]; then
  [[ -n $accelerator_type ]] || fail 2 "--accelerator-type=TYPE is missing, such as --accelerator-type=v5litepod-16"
  [[ $accelerator_type =~ ^(v4|v5litepod|v5p|v6e)-[1-9][0-9]*$ ]] ||
    fail 2 "unknown accelerator type $accelerator_type; known are v4-N, v5litepod-N, v5p-N and v6e-N"
fi
if [[ $command == run || $command == resume ]]; then
  arguments=" ${training[*]-} "
  [[ $arguments == *" --config="* ]] || fail 2 "no --config=FILE after --: $command -- --config=FILE --workdir=FOLDER"
  # A local folder would be lost with the slice, and no worker could read what another wrote.
  [[ $arguments == *" --workdir=/"* ]] ||
    fail 2 "no --workdir=/FOLDER after --: one that all workers share, such as $MOUNT/run with --bucket=BUCKET"
  [[ $arguments != *" --workdir=$MOUNT"[/\ ]* || -n $bucket ]] ||
    fail 2 "--workdir is in $MOUNT, but no bucket is mounted there: add --bucket=BUCKET"
elif [[ ${#training[@]} -gt 0 ]]; then
  fail 2 "$command takes nothing after --"
fi
[[ -n $dry_run ]] || command -v gcloud >/dev/null || fail 2 "gcloud is not on the PATH; install the Google Cloud CLI"

location=("--zone=$zone")
if [[ -n $project ]]; then location+=("--project=$project"); fi
case $command in
  log) follow_log ;;
  *) "$command" ;;
esac

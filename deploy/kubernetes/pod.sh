#!/usr/bin/env bash
# Main process of a pod of gpt-server.yaml. The first pod of a group starts mpirun, which reaches the others over ssh:
# RANKS_PER_POD ranks on each. The others run sshd for it, as the image's user, on port 2222. Flags are server.py's.
#
# /ssh holds the key pair of the group: id_ed25519 and id_ed25519.pub.
set -euo pipefail

mkdir -p ~/.ssh && chmod 700 ~/.ssh
install -m 600 /ssh/id_ed25519 ~/.ssh/id_ed25519
install -m 600 /ssh/id_ed25519.pub ~/.ssh/authorized_keys
printf '%s\n' 'Port 2222' 'StrictHostKeyChecking no' 'UserKnownHostsFile /dev/null' 'LogLevel ERROR' \
  'ServerAliveInterval 5' 'ServerAliveCountMax 3' >~/.ssh/config

has_rank() { grep -qs server.py /proc/[0-9]*/cmdline; }

if [ "${LWS_WORKER_INDEX:?}" -gt 0 ]; then
  ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/host_key
  /usr/sbin/sshd -D -e -p 2222 -h ~/.ssh/host_key -o PidFile=none -o UsePAM=no -o PasswordAuthentication=no &
  # All pods get SIGTERM at once. This one stays until the first one's drain has ended its ranks.
  trap 'while has_rank; do sleep 0.2; done; kill %1' TERM
  wait || true # 143 after SIGTERM
  exit 0
fi

# The names of a group's pods: its first one's, then a number after it, each below the set's headless service.
leader=${LWS_LEADER_ADDRESS:?}
HOSTS=$leader:${RANKS_PER_POD:?}
for ((index = 1; index < ${LWS_GROUP_SIZE:?}; index++)); do
  host=${leader%%.*}-$index.${leader#*.}
  until ssh "$host" true 2>/dev/null; do
    echo "waiting for sshd on $host"
    sleep 2
  done
  HOSTS+=,$host:$RANKS_PER_POD
done
export HOSTS NP=$((LWS_GROUP_SIZE * RANKS_PER_POD))
exec deploy/docker/entrypoint.sh "$@"

#!/usr/bin/env bash
# A real SLURM cluster on this one machine, for tests: every daemon real, the nodes only names for it. Needs root, and apt
# where SLURM is not installed yet; no systemd. Nothing outside its folder is touched, and it listens on 127.0.0.1 only.
#
#   bash tests/slurm_cluster.sh start      starts what is not running yet; ends with 77 where this machine cannot have it
#   bash tests/slurm_cluster.sh status     nodes and jobs
#   eval "$(bash tests/slurm_cluster.sh env)"                   sbatch, squeue, ... of this shell talk to it
#   bash tests/slurm_cluster.sh stop       cancels all jobs, stops the daemons
#
# CLUSTER_DIR (configuration, logs, state), CLUSTER_PORT (the first of one port for the controller and one for each node),
# CLUSTER_NODES, and for each node CLUSTER_CPUS, CLUSTER_GPUS (pretended), CLUSTER_MEMORY (megabytes); none of these needs to be
# true. CLUSTER_KILL_WAIT: seconds between SIGTERM and SIGKILL; CLUSTER_GRACE: seconds that a preempted job gets.
set -euo pipefail
directory=${CLUSTER_DIR:-${TMPDIR:-/tmp}/slurm-cluster}
port=${CLUSTER_PORT:-16817}
nodes=${CLUSTER_NODES:-1}
cpus=${CLUSTER_CPUS:-$(nproc)}
gpus=${CLUSTER_GPUS:-0}
memory=${CLUSTER_MEMORY:-$(awk '/MemTotal/ { print int($2 * 0.9 / 1024) }' /proc/meminfo)}
kill_wait=${CLUSTER_KILL_WAIT:-5}
export SLURM_CONF=$directory/etc/slurm.conf

fail() { # fail STATUS REASON
    echo "slurm_cluster.sh: $2" >&2
    exit "$1"
}

# Prints the process id of a daemon: munged, slurmctld, slurmd-n1, ... Fails where it does not run; a number that the system
# gave to another program since does not count.
pid_of() {
    local pid
    pid=$(cat "$directory/run/$1.pid" 2>/dev/null) && [ -n "$pid" ] || return 1
    [[ $(readlink "/proc/$pid/exe") == */"${1%%-*}"* ]] && echo "$pid" # Debian: slurmd-wlm
}

# Starts a daemon (its name, its command) where it does not run yet, in a namespace of its own where this host is called
# localhost: with NoInAddrAny SLURM binds to the address of the host's name, which is to be 127.0.0.1.
start_daemon() {
    pid_of "$1" >/dev/null || unshare --uts sh -c 'hostname localhost && exec "$@"' sh "${@:2}"
}

install_packages() {
    if ! type munged slurmctld slurmd sbatch >/dev/null 2>&1; then
        command -v apt-get >/dev/null || fail 77 "SLURM is not installed, and there is no apt-get to install it"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge; } \
            >"$directory/log/apt.log" 2>&1 || fail 77 "SLURM could not be installed (see $directory/log/apt.log)"
    fi
}

write_configuration() {
    [ -s "$directory/munge/key" ] || (umask 077 && head --bytes=128 /dev/urandom >"$directory/munge/key")
    : >"$directory/etc/gres.conf"
    for ((number = 0; number < gpus; number++)); do # SLURM wants a device; each of these is another /dev/null
        [ -c "$directory/etc/gpu$number" ] || mknod "$directory/etc/gpu$number" c 1 3 || fail 77 "needs to make device files"
        echo "Name=gpu File=$directory/etc/gpu$number" >>"$directory/etc/gres.conf"
    done
    # Where a value is not SLURM's own, it is there to bind to 127.0.0.1, to need neither cgroups nor users nor mail, or to
    # save time:
    #   cred_expire          a requeued job waits until its credential has expired, 2 minutes by default
    #   config_overrides     nodes have as many CPUs as they say
    #   ReturnToService      a node comes back when its daemon does
    #   preempt_send_user_signal   jobs of the partition `preempt` get the signal of their own --signal before they must go
    cat >"$SLURM_CONF" <<END
ClusterName=one
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort=$port
AuthInfo=socket=$directory/run/munged.socket,cred_expire=5
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool/%n
SlurmctldPidFile=$directory/run/slurmctld.pid
SlurmdPidFile=$directory/run/slurmd-%n.pid
SlurmctldLogFile=$directory/log/slurmctld.log
SlurmdLogFile=$directory/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
KillWait=$kill_wait
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT CPUs=$cpus RealMemory=$memory Gres=gpu:$gpus
NodeName=n[1-$nodes] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))]
PartitionName=debug Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=preempt Nodes=ALL PriorityTier=1 GraceTime=${CLUSTER_GRACE:-0}
END
}

start() {
    [ "$(uname)" = Linux ] || fail 77 "needs Linux"
    [ "$(id -u)" = 0 ] || fail 77 "needs root"
    unshare --uts sh -c 'hostname localhost' 2>/dev/null || fail 77 "needs private namespaces (unshare --uts), forbidden here"
    mkdir -p "$directory"/{etc,run,log,state,spool,munge}
    chmod 755 "$directory" "$directory"/*
    chmod 700 "$directory/munge"
    install_packages
    pid_of slurmctld >/dev/null || write_configuration
    # --force: the folder may be one that only root can enter.
    start_daemon munged munged --force --key-file="$directory/munge/key" --seed-file="$directory/munge/seed" \
        --pid-file="$directory/run/munged.pid" --socket="$directory/run/munged.socket" --log-file="$directory/log/munged.log"
    start_daemon slurmctld slurmctld -f "$SLURM_CONF"
    for number in $(seq "$nodes"); do
        start_daemon "slurmd-n$number" slurmd -f "$SLURM_CONF" -N "n$number"
    done
    for _ in $(seq 120); do
        up=$(sinfo --noheader --Node --partition=debug --states=idle,mix,alloc 2>/dev/null | wc -l)
        [ "$up" != "$nodes" ] || exec sinfo
        sleep 0.25
    done
    tail --lines=20 "$directory"/log/*.log >&2
    fail 1 "the nodes did not come up"
}

# Stops a daemon, by force after ten seconds.
stop_daemon() {
    local pid
    pid=$(pid_of "$1") || return 0
    kill "$pid"
    for _ in $(seq 40); do
        pid_of "$1" >/dev/null || return 0
        [ -e "/proc/$pid/exe" ] || return 0
        sleep 0.25
    done
    kill -9 "$pid"
}

stop() {
    if pid_of slurmctld >/dev/null; then
        squeue --noheader --format=%A | sort --unique | xargs --no-run-if-empty scancel || true
        for _ in $(seq $((2 * kill_wait + 20))); do # a job's processes outlive the daemons; first they go
            [ -n "$(squeue --noheader 2>&1)" ] || break
            sleep 0.5
        done
    fi
    for file in "$directory"/run/{slurmd-*,slurmctld,munged}.pid; do
        stop_daemon "$(basename "$file" .pid)"
    done
}

case ${1-} in
    start) start ;;
    stop) stop ;;
    status) sinfo && squeue ;;
    env) echo "export SLURM_CONF=$SLURM_CONF" ;;
    *) fail 2 "start, stop, status or env" ;;
esac

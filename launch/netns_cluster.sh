#!/usr/bin/env bash
# Several hosts on one machine: each is a network namespace with an address and a link rate of its own. Needs root.
#
#     launch/netns_cluster.sh up 2 1gbit                                 # make 2 hosts, 1 Gbit/s in each direction
#     launch/netns_cluster.sh run 2 -- examples/ddp_dgc.py --epochs 3    # torchrun on both, one process per host
#     launch/netns_cluster.sh link 2 down                                # ip link set down on host 2 (or: up)
#     launch/netns_cluster.sh down                                       # remove all of it
#     launch/netns_cluster.sh once 2 1gbit -- train.py                   # up, run and down, also after a failure
#
# RATE is what `tc` takes (100mbit, 1gbit, ...), or none for no limit. COMMAND is a script, `-m module` or any program; it
# finds RANK, WORLD_SIZE and the rest in its environment, as under any torchrun. `link HOST unplugged` takes the
# switch's end away instead: the host keeps its address and what it sends vanishes, as with a cable pulled.
#
# Options, before or after the subcommand:
#     --name NAME      another cluster beside the first (default: net); letters and digits
# and for run and once:
#     --processes P    ranks per host (default: 1)
#     --deadline S     end everything after S seconds, with status 124 (default: none)
#     --grace S        how long the other hosts may go on after one has failed (default: 60)
#     --logs DIR       write DIR/host1.log, ... instead of printing with a prefix
#     --survivors      the other hosts outlive a rank that is killed (see torchrun_survivors.sh); rank 0 must live
#     --unpinned       do not give each host a core of its own (which is done where there are enough cores)
#
# run returns the status of the first host that failed, or 0. It ends what it started, also on Ctrl-C, and when the
# script itself is killed. A rank has OMP_NUM_THREADS threads (default: 1). Host i is the namespace distopt-NAME-i with
# address 10.88.0.i on eth0; nothing leaves these namespaces, nothing is changed outside of them, and clusters do not see
# each other. To look inside: `ip netns exec distopt-net-1 ip addr`. The hosts share the machine's files and cores.
set -euo pipefail

PREFIX=distopt
NETWORK=10.88.0
MAX_HOSTS=64
PORT=29500 # in namespaces of its own a job cannot meet another one

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }

fail() {
  printf 'netns_cluster.sh: %s\n' "$*" >&2
  exit 2
}

# -- names ------------------------------------------------------------------------------------------------------------

host() { printf '%s-%s-%s' "$PREFIX" "$name" "$1"; }
switch() { host switch; }

# The namespaces of this cluster, one a line.
namespaces() { ip netns list | awk '{print $1}' | grep -E "^$PREFIX-$name-(switch|[0-9]+)\$" || true; }

num_hosts() { namespaces | grep -cE -- '-[0-9]+$' || true; }

# -- checks -----------------------------------------------------------------------------------------------------------

check_machine() {
  [ "$(id -u)" = 0 ] || fail "network namespaces need root, got user $(id -un); run it with sudo"
  local tool
  for tool in ip tc; do
    command -v "$tool" >/dev/null || fail "$tool is missing; install iproute2"
  done
  for tool in setpriv setsid unshare taskset hostname awk; do
    command -v "$tool" >/dev/null || fail "$tool is missing; install util-linux, hostname and awk"
  done
}

check_count() { # what, value, lowest, highest
  if ! [[ $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] || [ "$2" -lt "$3" ] || [ "$2" -gt "$4" ]; then
    fail "$1 must be a number from $3 to $4, got '$2'"
  fi
}

check_rate() {
  [ "$1" = none ] || [[ $1 =~ ^[0-9]+(\.[0-9]+)?[kmg]bit$ ]] ||
    fail "RATE must be a number with kbit, mbit or gbit, or none, got '$1'; use 100mbit or 1gbit"
}

# -- up and down --------------------------------------------------------------------------------------------------------

# What may leave at once, in bytes: a millisecond's worth, and at least 128 KiB, two of the segments that veth passes on.
burst() {
  awk -v rate="$1" 'BEGIN {
    unit["k"] = 1e3; unit["m"] = 1e6; unit["g"] = 1e9
    bytes = rate * unit[substr(rate, length(rate) - 3, 1)] / 8 / 1000
    printf "%d", (bytes > 131072 ? bytes : 131072) }'
}

limit() { # namespace, device, rate
  [ "$3" = none ] || tc -n "$1" qdisc add dev "$2" root tbf rate "$3" burst "$(burst "$3")" latency 100ms
}

up() {
  local hosts=$1 rate=$2 i
  check_count N "$hosts" 1 $MAX_HOSTS
  check_rate "$rate"
  [ -z "$(namespaces)" ] ||
    fail "there is a cluster '$name' of $(num_hosts) hosts already; remove it with: $0 --name $name down"
  trap 'status=$?; [ $status = 0 ] || { down; echo "netns_cluster.sh: could not make the hosts; removed what was made" >&2; }' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP
  # The bridge has a namespace too, so that no interface, route or firewall rule of the machine comes near it.
  ip netns add "$(switch)"
  ip -n "$(switch)" link add bridge type bridge stp_state 0
  ip -n "$(switch)" link set bridge up
  for ((i = 1; i <= hosts; i++)); do
    ip netns add "$(host "$i")"
    ip -n "$(host "$i")" link set lo up
    ip -n "$(switch)" link add "port$i" type veth peer name eth0 netns "$(host "$i")"
    ip -n "$(switch)" link set "port$i" master bridge addrgenmode none up
    ip -n "$(host "$i")" link set eth0 addrgenmode none
    ip -n "$(host "$i")" addr add "$NETWORK.$i/24" dev eth0
    ip -n "$(host "$i")" link set eth0 up
    limit "$(host "$i")" eth0 "$rate"     # what the host sends
    limit "$(switch)" "port$i" "$rate"    # what it receives
    name_hosts "$hosts" "/etc/netns/$(host "$i")"
  done
  trap - EXIT INT TERM HUP
  echo "made $hosts hosts at $rate: $(host 1) to $(host "$hosts"), addresses $NETWORK.1 to $NETWORK.$hosts"
}

# `ip netns exec` puts this file in the place of /etc/hosts: the hosts know each other by name and ask no name server.
name_hosts() { # number of hosts, directory
  mkdir -p "$2"
  local i
  {
    echo "127.0.0.1 localhost"
    for ((i = 1; i <= $1; i++)); do
      echo "$NETWORK.$i host$i"
      echo "::ffff:$NETWORK.$i host$i" # how torch's store asks
    done
  } >"$2/hosts"
}

down() {
  local found namespace
  found=$(namespaces)
  for namespace in $found; do
    end_all "$(ip netns pids "$namespace" | xargs)"
    ip netns del "$namespace"
    rm -rf "/etc/netns/$namespace"
  done
  rmdir /etc/netns 2>/dev/null || true
  [ -n "$found" ] || echo "there is no cluster '$name': nothing to remove"
}

# -- processes --------------------------------------------------------------------------------------------------------

# Ends processes by id: asks first, and after a few seconds insists.
end_all() {
  local pids=$1 tries
  for tries in {1..51}; do
    pids=$(alive "$pids")
    [ -n "$pids" ] || return 0
    # shellcheck disable=SC2086  # several words are meant
    case $tries in
      1) kill -TERM $pids 2>/dev/null || true ;;
      31) kill -KILL $pids 2>/dev/null || true ;;
    esac
    sleep 0.1
  done
  echo "netns_cluster.sh: could not end the processes $pids" >&2
}

alive() {
  local pid
  for pid in $1; do
    grep -qsE '^State:\s+[^ZX]' "/proc/$pid/status" && printf '%s ' "$pid"
  done
  true
}

# The processes in the first N hosts that a run has started (not what a user started there by hand).
of_runs() { # number of hosts, the run or a pattern
  local i pid
  for ((i = 1; i <= $1; i++)); do
    for pid in $(ip netns pids "$(host "$i")" 2>/dev/null); do
      grep -qszE "^DISTOPT_NETNS_RUN=$2\$" "/proc/$pid/environ" && printf '%s ' "$pid"
    done
  done
  true
}

# What a run left behind whose script was killed with no chance to clean up; the run's name begins with its process id.
end_orphans() { # number of hosts
  local pid run orphans=
  for pid in $(of_runs "$1" '.*'); do
    run=$(tr '\0' '\n' <"/proc/$pid/environ" 2>/dev/null | sed -n 's/^DISTOPT_NETNS_RUN=//p') || true
    grep -qs netns_cluster "/proc/${run%-*}/cmdline" || orphans+="$pid "
  done
  end_all "$orphans"
}

# The cores this script may use, one a line.
cores() {
  local range
  for range in $(taskset -cp $$ | sed 's/.*: //; s/,/ /g'); do
    seq "${range%-*}" "${range#*-}"
  done
}

# -- run ----------------------------------------------------------------------------------------------------------------

run() {
  local hosts=$1
  shift
  local found i status=0
  found=$(num_hosts)
  [ "$found" -gt 0 ] || fail "there is no cluster '$name'; make it with: $0 --name $name up $hosts 1gbit"
  check_count N "$hosts" 1 "$found"
  check_count --processes "$processes" 1 1024
  [ -z "$deadline" ] || check_count --deadline "$deadline" 1 999999
  check_count --grace "$grace" 0 999999
  [ $# -gt 0 ] || fail "run needs a command, got none; use: $0 run $hosts -- train.py"
  end_orphans "$hosts"
  [ -z "$(of_runs "$hosts" '.*')" ] || fail "a run is under way in cluster '$name'; wait for it, or use another --name"
  [ -z "$logs" ] || mkdir -p "$logs"
  case $1 in
    *.py | -m) set -- python "$@" ;;
  esac
  if [ "$survivors" = yes ]; then
    set -- bash "$(dirname "${BASH_SOURCE[0]}")/torchrun_survivors.sh" --rank "$@"
  fi

  local id="$$-$RANDOM" own_cores=()
  mapfile -t own_cores < <(cores)
  if [ "$pinned" = no ] || [ "$hosts" -gt ${#own_cores[@]} ]; then own_cores=(); fi
  agents=() printers=() timer=
  trap 'finish "'"$hosts"'" "'"$id"'"' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP
  for ((i = 1; i <= hosts; i++)); do
    start "$i" "$hosts" "$id" "${own_cores[i - 1]:-}" "$@"
  done
  wait_for_agents || status=$?
  exit "$status" # the trap ends what is left
}

# Starts torchrun on one host. The chain of exec keeps the process id, and the kernel asks torchrun (which ends its
# workers) to stop if this script dies.
start() { # host, number of hosts, run, core or nothing, command
  local number=$1 hosts=$2 id=$3 core=$4 out err
  shift 4
  local prefix=()
  [ -z "$core" ] || prefix=(taskset -c "$core")
  if [ -n "$logs" ]; then
    exec {out}>"$logs/host$number.log"
    exec {err}>&"$out"
  else
    exec {out}> >(trap '' INT TERM HUP && exec sed -u "s/^/host$number| /")
    printers+=($!)
    exec {err}> >(trap '' INT TERM HUP && exec sed -u "s/^/host$number| /" >&2)
    printers+=($!)
  fi
  # shellcheck disable=SC2016  # the inner shell expands these
  DISTOPT_NETNS_RUN=$id GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0 \
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1 \
    setsid setpriv --pdeathsig TERM ip netns exec "$(host "$number")" unshare --uts \
    bash -c 'hostname "$0" && exec "$@"' "host$number" \
    "${prefix[@]}" python -m torch.distributed.run \
    --nnodes "$hosts" --node-rank "$((number - 1))" --nproc-per-node "$processes" \
    --master-addr "$NETWORK.1" --master-port "$PORT" --no-python "$@" \
    </dev/null 1>&"$out" 2>&"$err" &
  agents+=($!)
  exec {out}>&- {err}>&-
}

# Waits for all hosts, but for not longer than the deadline, and not longer than the grace after the first failure.
wait_for_agents() {
  local left=("${agents[@]}") first=0 ended status
  if [ -n "$deadline" ]; then
    start_timer "$deadline"
  fi
  while [ ${#left[@]} -gt 0 ]; do
    status=0
    wait -n -p ended "${left[@]}" ${timer:+"$timer"} || status=$?
    if [ "$ended" = "$timer" ]; then
      timer=
      [ "$first" = 0 ] || return "$first"
      echo "netns_cluster.sh: ${#left[@]} hosts have not ended within the deadline of $deadline s; ending them" >&2
      return 124
    fi
    local remaining=() agent
    for agent in "${left[@]}"; do
      [ "$agent" = "$ended" ] || remaining+=("$agent")
    done
    left=("${remaining[@]}")
    if [ "$status" != 0 ] && [ "$first" = 0 ]; then
      first=$status
      start_grace
    fi
  done
  return "$first"
}

start_grace() {
  if [ -n "$timer" ]; then
    [ "$grace" -lt "$((deadline - SECONDS))" ] || return 0 # the deadline comes first
    stop_timer
  fi
  start_timer "$grace"
}

start_timer() { # seconds
  sleep "$1" >/dev/null 2>&1 &
  timer=$!
}

# KILL, because a child that bash has forked but not yet replaced by sleep still runs bash's own traps and loses a TERM.
stop_timer() {
  [ -n "$timer" ] || return 0
  disown "$timer" 2>/dev/null || true # else bash reports that it was killed
  kill -KILL "$timer" 2>/dev/null || true
  timer=
}

finish() { # number of hosts, run
  trap '' INT TERM HUP EXIT
  stop_timer
  # Agents that are asked end their workers; what is left after that is asked too.
  end_all "${agents[*]}"
  end_all "$(of_runs "$1" "$2")"
  wait "${printers[@]}" 2>/dev/null || true
  [ "$remove_after" = no ] || down
}

# -- link -----------------------------------------------------------------------------------------------------------

link() {
  local number=$1 state=$2
  [ "$(num_hosts)" -gt 0 ] || fail "there is no cluster '$name'; make it with: $0 --name $name up 2 1gbit"
  check_count HOST "$number" 1 "$(num_hosts)"
  case $state in
    up)
      ip -n "$(switch)" link set "port$number" up
      ip -n "$(host "$number")" link set eth0 up
      ;;
    down) ip -n "$(host "$number")" link set eth0 down ;;
    unplugged) ip -n "$(switch)" link set "port$number" down ;;
    *) fail "a link can be set up, down or unplugged, got '$state'" ;;
  esac
}

# -- arguments ----------------------------------------------------------------------------------------------------------

name=net processes=1 deadline='' grace=60 logs='' pinned=yes survivors=no remove_after=no
words=()
while [ $# -gt 0 ]; do
  case $1 in
    --name | --processes | --deadline | --grace | --logs)
      [ $# -gt 1 ] || fail "$1 needs a value, got none"
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --survivors) survivors=yes ;;
    --unpinned) pinned=no ;;
    --help | -h)
      usage
      exit 0
      ;;
    --)
      shift
      break
      ;;
    -*) fail "unknown option $1; see: $0 --help" ;;
    *) words+=("$1") ;;
  esac
  shift
done
# What is left in $@ is the command behind --.

expect() { # number of words behind the subcommand, how to write it
  [ ${#words[@]} = "$(($1 + 1))" ] || fail "got '${words[*]}'; write it: $0 $2"
}

[[ $name =~ ^[a-z0-9]{1,16}$ ]] || fail "--name must be 1 to 16 small letters and digits, got '$name'"
case ${words[0]:-} in
  up) expect 2 'up N RATE' ;;
  run) expect 1 'run N -- COMMAND' ;;
  once) expect 2 'once N RATE -- COMMAND' ;;
  link) expect 2 'link HOST down|up|unplugged' ;;
  down) expect 0 'down' ;;
  '') fail "what to do? up, run, once, link or down; see: $0 --help" ;;
  *) fail "unknown subcommand '${words[0]}'; use up, run, once, link or down" ;;
esac
check_machine
case ${words[0]} in
  once)
    [ $# -gt 0 ] || fail "once needs a command, got none; use: $0 once 2 1gbit -- train.py"
    up "${words[@]:1}"
    remove_after=yes
    run "${words[1]}" "$@"
    ;;
  run) run "${words[1]}" "$@" ;;
  *) "${words[@]}" ;;
esac

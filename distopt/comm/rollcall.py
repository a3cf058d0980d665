"""Starts the heartbeats of a group: ranks tell each other their addresses, and all see whether datagrams get through.

Where they do not (a firewall that lets only TCP pass, an address that others cannot reach) no rank is watched, on all
ranks alike, and the reason is there to be told: a watch that accuses peers because of a firewall is worse than none.

Datagrams go through the interface that gloo is told to use (GLOO_SOCKET_IFNAME), or else through the one that leads to
MASTER_ADDR. Blocking; for set-up only.
"""

import os
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist

from distopt.comm.address import own_address
from distopt.comm.agreement import gather_json
from distopt.comm.beats import MAX_RANKS, NONCE_BYTES
from distopt.comm.heartbeat import Heartbeat, Member
from distopt.errors import PeerLostError

_REACH_S = 10.0  # hosts answer each other within milliseconds, but a busy one may take its time


def open_heartbeat(
    group: dist.ProcessGroup, device: torch.device, *, timeout_s: float, on_loss: Callable[[PeerLostError], None]
) -> tuple[Heartbeat | None, str]:
    """The heartbeat of this rank, watching; or None and the reason why there is none on any rank. Collective.

    Args:
        group: The ranks.
        device: Where the group's backend wants its tensors.
        timeout_s: A rank that is silent for so long is lost.
        on_loss: Is called once, in a thread, with the error that names the lost ranks.
    """
    endpoint, problem = None, None
    try:
        if group.size() > MAX_RANKS:
            raise OSError(f"a heartbeat carries at most {MAX_RANKS} ranks")
        endpoint = _endpoint()
    except OSError as error:
        problem = f"{socket.gethostname()} cannot open a socket: {error}"
    address, port = endpoint.getsockname() if endpoint is not None else ("", 0)
    facts = gather_json(
        {
            "rank": dist.get_rank(),
            "host": socket.gethostname(),
            "address": address,
            "port": port,
            "nonce": os.urandom(NONCE_BYTES).hex(),  # the first rank's counts
            "problem": problem,
        },
        group,
        device,
    )
    problems = [fact["problem"] for fact in facts if fact["problem"]]
    if problems or endpoint is None:
        if endpoint is not None:
            endpoint.close()
        return None, problems[0]
    members = [Member(fact["rank"], fact["host"], fact["address"], fact["port"]) for fact in facts]
    own, nonce = group.rank(), bytes.fromhex(facts[0]["nonce"])
    heartbeat = Heartbeat(own, members, nonce, endpoint, timeout_s=timeout_s, on_loss=on_loss)
    unheard = gather_json(heartbeat.wait_for_all(_REACH_S), group, device)
    deaf = {members[rank]: [members[other] for other in others] for rank, others in enumerate(unheard) if others}
    if deaf:
        heartbeat.close()
        hearer, silent = next(iter(deaf.items()))
        return None, (
            f"{hearer} gets no datagrams from {silent[0]}, which sends from {silent[0].address}; let UDP pass between "
            "the hosts, or name their common interface in GLOO_SOCKET_IFNAME"
        )
    heartbeat.watch()
    return heartbeat, ""


def _endpoint() -> socket.socket:
    endpoint = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        endpoint.bind((own_address(os.environ.get("MASTER_ADDR")), 0))  # without one the roll call tells hosts apart
    except OSError:
        endpoint.close()
        raise
    return endpoint

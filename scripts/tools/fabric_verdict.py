"""What the numbers of a fabric check and NCCL's log mean: pure functions, without torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple, Optional

# nccl-tests, doc/PERFORMANCE.md: what bytes/time must be multiplied by, so that the number can be
# held against the hardware's, whatever the number of ranks.
FACTORS = {"all-reduce": lambda ranks: 2 * (ranks - 1) / ranks, "broadcast": lambda ranks: 1.0}
SLOW = 0.5  # of the others' bandwidth
TCP = ("tcp", "sockets", "udp", "net")  # libfabric's providers that are sockets, too


def bus_bandwidth(operation: str, size: int, seconds: float, ranks: int) -> float:
    """Compute GB/s (10⁹ bytes) from one call's bytes and seconds, as nccl-tests define it."""
    return FACTORS[operation](ranks) * size / seconds / 1e9


# --- pairs


class Pair(NamedTuple):
    """Say what came of one pair of peers, by their numbers."""

    first: int
    second: int
    bandwidth: Optional[float]  # GB/s each way; None if nothing was exchanged
    silent: Optional[int] = None  # which of them did not answer the other
    said: str = ""  # how the exchange failed


def rounds(peers: int) -> int:
    """Count the rounds: ⌈log₂ peers⌉ + 1, or fewer where all pairs are through before."""
    return min(peers - 1 + peers % 2, math.ceil(math.log2(peers)) + 1)


def partner(peer: int, peers: int, number: int) -> Optional[int]:
    """Return whom a peer exchanges with in a round, from 0; None if it has a rest.

    These are the first rounds of a round robin (the circle method). No pair comes twice, so each
    of three peers or more has at least two partners, and one slow partner does not blame it. With
    peer XOR 2^round some have one: of three, 1 and 2 would have 0 alone.
    """
    circle = peers - 1 + peers % 2  # with an even number, the last peer stands outside
    if peer >= circle:
        found = next(p for p in range(circle) if 2 * p % circle == number % circle)
    else:
        found = (number - peer) % circle
        found = circle if found == peer else found
    return found if found < peers else None


def slow(pairs: Sequence[Pair], names: Sequence[str]) -> list[str]:
    """Name the peers whose best pair has less than half the bandwidth of the median peer's best.

    Of two peers neither is blamed: a pair does not say which of both it is."""
    best: dict[int, float] = {}
    for pair in pairs:
        for peer in pair[:2]:
            best[peer] = max(best.get(peer, 0.0), pair.bandwidth or 0.0)
    best = {peer: value for peer, value in best.items() if value}
    if len(best) < 3:
        return []
    middle = median(best.values())
    return [
        f"{names[peer]}: {best[peer]:.2f} GB/s at best, the median {middle:.2f}"
        for peer in sorted(best)
        if best[peer] < SLOW * middle
    ]


def broken(pairs: Sequence[Pair], names: Sequence[str]) -> list[str]:
    """Name, a sentence each, the peers that did not answer, and the pairs that did not exchange."""
    silent: dict[int, list[int]] = {p.silent: [] for p in pairs if p.silent is not None}
    failed = [pair for pair in pairs if pair.bandwidth is None]
    for pair in failed:
        for one, other in (pair[:2], pair[1::-1]):
            if one in silent and other not in silent:
                silent[one].append(other)
    found = [
        f"{names[peer]} did not answer {' and '.join(names[one] for one in partners) or 'anyone'}; "
        "look at its processes and its network"
        for peer, partners in silent.items()
    ]
    heard = [pair for pair in failed if not {*pair[:2]} & {*silent}]
    for pair in heard:
        both = f"{names[pair.first]} and {names[pair.second]}"
        found.append(f"{both} answer, but could not exchange data: {pair.said}")
    well = {peer for pair in pairs if pair.bandwidth is not None for peer in pair[:2]}
    alone = {peer for pair in heard for peer in pair[:2]} - well
    if well and len(alone) == 1:
        found.append(f"{names[alone.pop()]} could exchange with none of its partners")
    return found


def peer_names(hosts: Sequence[str], nodes: int) -> list[str]:
    """Name peers for people, by their hosts in order: node1; "rank 0" where all are on one node."""
    if nodes == 1:
        return [f"rank {number}" for number in range(len(hosts))]
    if len(set(hosts)) == len(hosts):
        return list(hosts)
    return [f"node {number} ({host})" for number, host in enumerate(hosts)]


# --- transport


class Transport(NamedTuple):
    """Say what carried the data of one rank."""

    network: str  # as NCCL names it: IB, Libfabric, Socket; "gloo"; "" if its log names none
    ways: tuple[str, ...] = ()  # NCCL's, between ranks: NET, P2P, SHM
    provider: str = ""  # libfabric's: efa, cxi, tcp
    direct: bool = False  # the network reads and writes GPU memory (GPUDirect RDMA)

    @property
    def sockets(self) -> bool:
        """Tell whether TCP carried the data. NCCL names its network on a single node, too, where
        nothing may go over it."""
        unused = self.ways and "NET" not in self.ways
        tcp = self.network in ("gloo", "Socket") or self.provider.split(";")[0] in TCP
        return tcp and not unused

    @property
    def told(self) -> str:
        """Say it in a few words."""
        if self.network == "gloo":
            return "gloo over TCP sockets"
        if not self.network:
            return "not known: NCCL's log names no network"
        if self.ways and "NET" not in self.ways:
            return f"NCCL by {' and '.join(self.ways)} between GPUs, and no network"
        words = "sockets" if self.network == "Socket" else self.network
        words += f", provider {self.provider}" if self.provider else ""
        return f"NCCL over {words}" + (", GPUDirect RDMA" if self.direct else "")


def read_transport(log: str) -> Transport:
    """Read what NCCL chose in its log of NCCL_DEBUG=INFO, SUBSYS INIT,NET; the last one counts.

    The texts are those in the libnccl.so of 2.29.7, and of aws-ofi-nccl from 1.7 ("Selected
    Provider is efa (found …") to 1.17 ("Selected provider is efa, fabric is …").
    """
    networks = re.findall(r"NCCL INFO Using network (.+?)\s*$", log, re.M)
    providers = re.findall(r"Selected provider is ([\w;+-]+)", log, re.I)
    ways = dict.fromkeys(re.findall(r"NCCL INFO Channel .*\bvia (NET|P2P|SHM)\b", log))
    return Transport(
        networks[-1] if networks else "",
        tuple(sorted(ways)),
        providers[-1] if networks and "fabric" in networks[-1].lower() and providers else "",
        bool(re.search(r"\bvia NET/.*/GDRDMA", log)),
    )


def by_host(hosts: Sequence[str], used: Sequence[Transport]) -> dict[str, Transport]:
    """Put what the ranks of a host used into one, in the order of ranks: only some of them may
    have talked over the network, and one that used sockets is enough."""
    found: dict[str, Transport] = {}
    for host, one in zip(hosts, used, strict=True):
        whole = found.get(host, one)
        named = one if one.sockets or not whole.network else whole
        ways = tuple(sorted({*whole.ways, *one.ways}))
        direct = whole.direct or one.direct
        found[host] = Transport(named.network, ways, named.provider, direct)
    return found


class Demand(NamedTuple):
    """Say what network a site asks for."""

    setting: str  # NCCL_NET=IB
    network: str  # InfiniBand


def demand(variables: Mapping[str, str]) -> Optional[Demand]:
    """Return what the environment asks for beyond sockets, by NCCL_NET, else by the plugin or the
    provider of libfabric; None if it leaves the choice to NCCL."""
    net = variables.get("NCCL_NET", "").strip()
    if net:
        known = {"aws libfabric": "EFA", "libfabric": "EFA", "ofi": "EFA", "socket": ""}
        wanted = known.get(net.lower(), "InfiniBand" if net.lower().startswith("ib") else net)
        return Demand(f"NCCL_NET={net}", wanted) if wanted else None
    plugin = variables.get("NCCL_NET_PLUGIN", "").strip()
    if re.search(r"\b(aws|ofi|libnccl-net-ofi)\b", plugin.lower()):
        return Demand(f"NCCL_NET_PLUGIN={plugin}", "EFA")
    if variables.get("FI_PROVIDER", "").strip().lower() == "efa":
        return Demand("FI_PROVIDER=efa", "EFA")
    return None


MEND = (
    "{where}: look for the network's plugin (libnccl-net*.so) in the image, for its devices "
    "(/dev/infiniband) in the container, and into logs/nccl-*.log; or ask for sockets, NCCL_NET="
    "Socket"
)


def not_found(asked: Optional[Demand], host: str, log: str) -> str:
    """Say that NCCL found no network as it was asked for, if its log on a host says so; else ""."""
    if not asked or not re.search(r"Failed to initialize any NET plugin|network .* not found", log):
        return ""
    said = f"{asked.setting} asks for {asked.network}, and NCCL finds no such network"
    return f"{said}; {MEND.format(where=host)}"


def unmet(asked: Optional[Demand], used: Mapping[str, Transport]) -> str:
    """Say what is wrong if a network was asked for and sockets were used on any host; else ""."""
    hosts = [host for host, transport in used.items() if transport.sockets]
    if not asked or not hosts:
        return ""
    said = f"{asked.setting} asks for {asked.network}, but sockets were used"
    if used[hosts[0]].network == "gloo":
        mend = "run it where GPUs are, or leave that setting out"
        return f"{said} (gloo over TCP: torch sees no GPU here); {mend}"
    return f"{said} ({used[hosts[0]].told}); {MEND.format(where=listed(hosts))}"


def unjudged(asked: Optional[Demand], used: Mapping[str, Transport]) -> str:
    """Say that NCCL used no network, so that one that was asked for has not been tried; else ""."""
    tried = any(t.sockets or not t.ways or "NET" in t.ways for t in used.values())
    if not asked or tried:
        return ""
    return f"{asked.setting} was not tried: GPUs of one node need no network; NODES=2 does"


def judged(asked: Optional[Demand], used: Mapping[str, Transport]) -> dict[str, list[str]]:
    """Return what a report says of the transport: {"transport", "notes", "problems"}."""
    note, problem = unjudged(asked, used), unmet(asked, used)
    return {
        "transport": by_transport(used),
        "notes": [note] if note else [],
        "problems": [problem] if problem else [],
    }


# --- what is said


def listed(names: Sequence[str]) -> str:
    """Write names in a row; of a thousand nodes the first eight."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def megabytes(size: int) -> str:
    """Write bytes as people do."""
    return f"{size >> 20} MB"


def by_transport(used: Mapping[str, Transport]) -> list[str]:
    """Say what carried the data: one line if it was the same on all hosts, else one for each."""
    hosts: dict[str, list[str]] = {}
    for host, transport in used.items():
        hosts.setdefault(transport.told, []).append(host)
    if len(hosts) == 1:
        return list(hosts)
    return [f"{told} on {listed(names)}" for told, names in hosts.items()]


def in_short(report: Mapping[str, Any]) -> str:
    """Say a report in a few words, for the table of make status."""
    best = {row["operation"]: row for row in report["table"]}  # the largest size comes last
    parts = [f"{name} {row['bandwidth']:.2f} GB/s" for name, row in best.items()]
    parts += [report["transport"][0]] if report["transport"] else []
    return ", ".join(parts) + "".join(f"; slow: {name}" for name in report["slow"])


def lines(report: Mapping[str, Any]) -> list[str]:
    """Format a report, a line each."""
    nodes = "1 node" if report["nodes"] == 1 else f"{report['nodes']} nodes"
    said = [f"{report['ranks']} ranks on {nodes}: {listed(report['hosts'])}"]
    said += [
        f"{row['operation']:<11} {megabytes(row['bytes']):>8} {row['bandwidth']:>9.2f} GB/s"
        for row in report["table"]
    ]
    said += [f"transport: {told}" for told in report["transport"]]
    said += [f"pairs: {report['slowest']}"]
    said += [f"slow: {told}" for told in report["slow"]]
    return said + [f"note: {note}" for note in report["notes"]]

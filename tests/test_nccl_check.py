"""make nccl-check: what its numbers mean, who is named slow or broken, and the check itself on two
gloo ranks."""

import json
import math
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from scripts.run import stages
from scripts.run.errors import InputError
from scripts.tools import fabric, fabric_pairs, fabric_verdict
from scripts.tools.fabric_verdict import Demand, Pair, Transport, demand, read_transport
from tests.support.launching import assert_refused, call_make, launch, make
from tests.support.runs import ROOT, finished, history, runs_root, stage_dir

# --- the judgement


@pytest.mark.parametrize("peers", [*range(2, 40), 1000])
def test_rounds_are_few_and_no_pair_comes_twice(peers):
    rounds = fabric_verdict.rounds(peers)
    assert rounds <= math.ceil(math.log2(peers)) + 1
    met = {peer: [] for peer in range(peers)}
    for number in range(rounds):
        for peer in range(peers):
            other = fabric_verdict.partner(peer, peers, number)
            if other is not None:
                assert other != peer, f"round {number}: {peer} would exchange with itself"
                back = fabric_verdict.partner(other, peers, number)
                assert back == peer, f"round {number}: {peer} has {other}, {other} has {back}"
                met[peer].append(other)
    for peer, others in met.items():
        assert len(others) == len(set(others)), f"{peer} meets someone twice: {others}"
        assert len(others) >= min(2, peers - 1), f"{peer} has {others} alone"


@pytest.mark.parametrize(
    ("operation", "size", "seconds", "ranks", "wanted"),
    [
        ("all-reduce", 10**9, 1.0, 2, 1.0),
        ("all-reduce", 10**9, 1.0, 4, 1.5),
        ("all-reduce", 10**9, 0.5, 16, 3.75),
        ("broadcast", 10**9, 0.5, 2, 2.0),
        ("broadcast", 10**9, 0.5, 16, 2.0),
    ],
)
def test_bus_bandwidth_is_that_of_nccl_tests(operation, size, seconds, ranks, wanted):
    found = fabric_verdict.bus_bandwidth(operation, size, seconds, ranks)
    assert found == pytest.approx(wanted)


def all_pairs(peers, bandwidth):
    """The pairs of all rounds, each with bandwidth(first, second)."""
    found = set()
    for number in range(fabric_verdict.rounds(peers)):
        for peer in range(peers):
            other = fabric_verdict.partner(peer, peers, number)
            found |= set() if other is None else {tuple(sorted((peer, other)))}
    return [Pair(a, b, bandwidth(a, b)) for a, b in sorted(found)]


@pytest.mark.parametrize("peers", range(3, 18))
def test_each_slow_node_is_named_and_no_other(peers):
    names = [f"node{n}" for n in range(peers)]
    for bad in range(peers):
        pairs = all_pairs(peers, lambda a, b, bad=bad: 4.0 if bad in (a, b) else 10 + (a + b) / 9)
        said = fabric_verdict.slow(pairs, names)
        assert [one.split(":")[0] for one in said] == [f"node{bad}"], pairs
        assert "4.00 GB/s at best" in said[0]


@pytest.mark.parametrize(
    ("peers", "bandwidth"),
    [
        (2, lambda a, b: 1.0),
        (8, lambda a, b: 10.0),
        (8, lambda a, b: 6.0 + a),  # some differ, none by half
        (8, lambda a, b: 0.1 if (a, b) == (2, 6) else 10.0),  # one way between two good nodes
    ],
)
def test_nobody_is_blamed_without_reason(peers, bandwidth):
    assert fabric_verdict.slow(all_pairs(peers, bandwidth), [str(n) for n in range(peers)]) == []


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([Pair(0, 1, 2.0)], []),
        ([Pair(0, 1, None, 1)], ["b did not answer a;"]),
        ([Pair(0, 1, 2.0), Pair(0, 2, None, 2), Pair(1, 2, None, 2)], ["c did not answer a and b"]),
        (
            [Pair(0, 1, 2.0), Pair(1, 2, None, None, "reset"), Pair(0, 2, None, 2)],
            ["c did not answer b and a; look"],
        ),
        ([Pair(0, 1, None, None, "reset")], ["a and b answer, but could not exchange data: reset"]),
        (
            [Pair(0, 1, 2.0), Pair(0, 2, None, None, "x"), Pair(1, 2, None, None, "y")],
            ["a and c answer,", "b and c answer,", "c could exchange with none"],
        ),
    ],
)
def test_what_is_broken_is_named(pairs, said):
    found = fabric_verdict.broken(pairs, ["a", "b"] if len(pairs) == 1 else ["a", "b", "c"])
    assert len(found) == len(said), found
    for sentence, words in zip(found, said):
        assert sentence.startswith(words), f"{sentence!r} does not begin with {words!r}"


@pytest.mark.parametrize(
    ("hosts", "nodes", "names"),
    [
        (["x", "x"], 1, ["rank 0", "rank 1"]),
        (["x", "y"], 2, ["x", "y"]),
        (["x", "x"], 2, ["node 0 (x)", "node 1 (x)"]),
    ],
)
def test_peers_have_names(hosts, nodes, names):
    assert fabric_verdict.peer_names(hosts, nodes) == names


# --- the transport

INFO = "node1:1482:1520 [0] NCCL INFO "
INFINIBAND = f"""\
{INFO}NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB eth0:10.0.0.1<0>
{INFO}Initialized NET plugin IB
{INFO}Assigned NET plugin IB to comm
{INFO}Using network IB
{INFO}Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
{INFO}Channel 00/0 : 7[7] -> 8[0] [receive] via NET/IB/0/GDRDMA
{INFO}Channel 00/0 : 0[0] -> 8[0] [send] via NET/IB/0(1)/GDRDMA
"""
EFA = f"""\
{INFO}NET/OFI Initializing aws-ofi-nccl 1.16.2
{INFO}NET/OFI Selected provider is efa, fabric is efa-direct (found 16 nics)
{INFO}Using network Libfabric
{INFO}Channel 00/0 : 0[0] -> 8[0] [send] via NET/Libfabric/0/GDRDMA
"""
OLD_EFA = f"""\
{INFO}NET/OFI Selected Provider is efa (found 1 nics)
{INFO}Using network AWS Libfabric
{INFO}Channel 00/0 : 1[0] -> 0[0] [receive] via NET/AWS Libfabric/0
"""
SOCKETS = f"""\
{INFO}NET/IB : No device found.
{INFO}NET/Socket : Using [0]eth0:172.17.16.64<0>
{INFO}Using network Socket
{INFO}Channel 00/0 : 0[0] -> 1[0] [send] via NET/Socket/0
"""
ONE_NODE = f"""\
{INFO}Using network Socket
{INFO}Channel 00/24 : 0[0] -> 1[1] via P2P/CUMEM
{INFO}Channel 02 : 1[1] -> 0[0] via SHM/direct/direct
"""
ASKED = Demand("NCCL_NET_PLUGIN=ofi", "EFA")
OFI_OVER_TCP = OLD_EFA.replace("is efa", "is tcp;ofi_rxm")


@pytest.mark.parametrize(
    ("log", "wanted", "told", "sockets"),
    [
        (
            INFINIBAND,
            Transport("IB", ("NET", "P2P"), "", True),
            "NCCL over IB, GPUDirect RDMA",
            False,
        ),
        (
            EFA,
            Transport("Libfabric", ("NET",), "efa", True),
            "NCCL over Libfabric, provider efa, GPUDirect RDMA",
            False,
        ),
        (
            OLD_EFA,
            Transport("AWS Libfabric", ("NET",), "efa"),
            "NCCL over AWS Libfabric, provider efa",
            False,
        ),
        (SOCKETS, Transport("Socket", ("NET",)), "NCCL over sockets", True),
        (
            ONE_NODE,
            Transport("Socket", ("P2P", "SHM")),
            "NCCL by P2P and SHM between GPUs, and no network",
            False,
        ),
        (
            OFI_OVER_TCP,
            Transport("AWS Libfabric", ("NET",), "tcp;ofi_rxm"),
            "NCCL over AWS Libfabric, provider tcp;ofi_rxm",
            True,
        ),
        (INFINIBAND + SOCKETS, Transport("Socket", ("NET", "P2P"), "", True), None, True),
        ("", Transport(""), "not known: NCCL's log names no network", False),
    ],
)
def test_nccls_log_is_read(log, wanted, told, sockets):
    found = read_transport(log)
    assert found == wanted
    assert found.sockets == sockets
    assert told is None or found.told == told
    assert fabric_verdict.not_found(ASKED, "a", log) == ""


@pytest.mark.parametrize(
    "line",
    [
        "node1:14:14 [0] net.cc:345 NCCL WARN Error: network IB not found.",
        "node1:14:14 [0] plugin/net.cc:301 NCCL WARN Failed to initialize any NET plugin",
    ],
)
def test_a_network_that_nccl_does_not_find_is_seen(line):
    log = f"{INFO}NET/IB : No device found.\n{line}\n"
    said = fabric_verdict.not_found(Demand("NCCL_NET=IB", "InfiniBand"), "node1", log)
    assert said.startswith("NCCL_NET=IB asks for InfiniBand, and NCCL finds no such network; node1")
    assert fabric_verdict.not_found(None, "node1", log) == ""


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, None),
        ({"NCCL_NET": ""}, None),
        ({"NCCL_NET": "Socket"}, None),
        ({"NCCL_NET": "Socket", "FI_PROVIDER": "efa"}, None),
        ({"NCCL_NET": "AWS Libfabric"}, Demand("NCCL_NET=AWS Libfabric", "EFA")),
        ({"NCCL_NET": "Libfabric"}, Demand("NCCL_NET=Libfabric", "EFA")),
        ({"NCCL_NET": "ofi"}, Demand("NCCL_NET=ofi", "EFA")),
        ({"NCCL_NET": "IB"}, Demand("NCCL_NET=IB", "InfiniBand")),
        ({"NCCL_NET": "IBext_v8"}, Demand("NCCL_NET=IBext_v8", "InfiniBand")),
        ({"NCCL_NET": "gIB"}, Demand("NCCL_NET=gIB", "gIB")),
        ({"NCCL_NET_PLUGIN": "ofi"}, Demand("NCCL_NET_PLUGIN=ofi", "EFA")),
        ({"NCCL_NET_PLUGIN": "none"}, None),
        (
            {"NCCL_NET_PLUGIN": "/opt/lib/libnccl-net-ofi.so"},
            Demand("NCCL_NET_PLUGIN=/opt/lib/libnccl-net-ofi.so", "EFA"),
        ),
        ({"FI_PROVIDER": "efa"}, Demand("FI_PROVIDER=efa", "EFA")),
        ({"FI_PROVIDER": "cxi"}, None),
    ],
)
def test_what_the_site_asks_for(variables, wanted):
    assert demand(variables) == wanted


@pytest.mark.parametrize(
    ("asked", "logs", "words"),
    [
        (None, {"a": SOCKETS, "b": SOCKETS}, ""),
        (ASKED, {"a": EFA, "b": OLD_EFA}, ""),
        (ASKED, {"a": ONE_NODE}, ""),
        (ASKED, {"a": EFA, "b": SOCKETS}, "sockets were used (NCCL over sockets); b: look for the"),
        (ASKED, {"a": OFI_OVER_TCP}, "sockets were used (NCCL over AWS Libfabric, provider tcp"),
    ],
)
def test_a_demand_is_held_against_what_was_used(asked, logs, words):
    said = fabric_verdict.unmet(asked, {host: read_transport(log) for host, log in logs.items()})
    assert words in said
    assert bool(said) == bool(words)


def test_a_demand_that_one_node_cannot_show_is_said():
    said = fabric_verdict.unjudged(ASKED, {"a": read_transport(ONE_NODE)})
    assert "NCCL_NET_PLUGIN=ofi was not tried" in said
    assert "NODES=2" in said
    for log in (EFA, SOCKETS):
        assert fabric_verdict.unjudged(ASKED, {"a": read_transport(log)}) == ""


def test_the_ranks_of_a_host_are_put_together():
    used = [read_transport(log) for log in (INFINIBAND, ONE_NODE.replace("Socket", "IB"), SOCKETS)]
    found = fabric_verdict.by_host(["a", "a", "a"], used[:1] + used[1:2] * 2)
    assert found == {"a": Transport("IB", ("NET", "P2P", "SHM"), "", True)}
    found = fabric_verdict.by_host(["a", "b", "b"], [used[0], *used[1:]])
    assert not found["a"].sockets
    assert found["b"].sockets, "one rank of it used sockets"


def test_hosts_that_differ_are_told_apart():
    used = {"a": Transport("IB"), "b": Transport("IB"), "c": Transport("Socket")}
    wanted = ["NCCL over IB on a, b", "NCCL over sockets on c"]
    assert fabric_verdict.by_transport(used) == wanted


# --- pairs, in threads that meet in torch's own store


def pairs(count, exchange, missing=(), patience=2.0):
    """Let peers go through the rounds, each in a thread; return the verdict."""
    from torch.distributed import HashStore

    store, names = HashStore(), [f"node{n + 1}" for n in range(count)]
    peers = [
        fabric_pairs.Pairs(store, n, names, exchange(n), patience)
        for n in range(count)
        if n not in missing
    ]
    threads = [threading.Thread(target=peer.run, daemon=True) for peer in peers]
    for thread in threads:
        thread.start()
    assert fabric_pairs.answered(store, ["pairs"], 60), "no verdict came"
    for thread in threads:
        thread.join(10)
    return json.loads(store.get("pairs"))


def test_all_is_well():
    found = pairs(4, lambda peer: lambda store, name, rank: 3.0)
    assert len(found["pairs"]) == 6
    assert (found["slow"], found["broken"]) == ([], [])
    assert found["slowest"].startswith("the slowest of 6 is ")


def test_a_slow_node_is_named():
    """The one whose side of an exchange is slow; the other side measures the same wait, or less."""
    found = pairs(4, lambda peer: lambda store, name, rank: 0.5 if peer == 2 else 3.0)
    assert found["slow"] == ["node3: 0.50 GB/s at best, the median 3.00"]
    assert "node3" in found["slowest"]
    assert found["broken"] == []


@pytest.mark.parametrize(("silent", "asked"), [(0, "node2"), (1, "node3"), (2, "node2")])
def test_a_node_that_does_not_answer_is_named(silent, asked, monkeypatch):
    monkeypatch.setattr(fabric_pairs, "SPARE", 0.2)
    found = pairs(3, lambda peer: lambda store, name, rank: 3.0, [silent], patience=0.8)
    assert len(found["broken"]) == 1, found
    assert found["broken"][0].startswith(f"node{silent + 1} did not answer {asked};")


def test_an_exchange_that_fails_or_hangs_is_named(monkeypatch):
    """node2 and node3 cannot reach each other; with a library that hangs they are out after it, and
    nobody else is blamed."""
    monkeypatch.setattr(fabric_pairs, "SPARE", 0.2)

    def refuse():
        raise RuntimeError("connection refused\nand a long trace")

    for fails, said in ((refuse, "connection refused"), (lambda: time.sleep(9), "nothing came in")):

        def exchange(peer, fails=fails):
            return lambda store, name, rank: fails() if name.endswith("/1") and peer else 3.0

        found = pairs(3, exchange, patience=0.8)
        words = f"node2 and node3 answer, but could not exchange data: {said}"
        assert len(found["broken"]) == 1, found["broken"]
        assert found["broken"][0].startswith(words)
        tried = 3 if fails is refuse else 1
        assert len(found["pairs"]) == tried, "what hangs keeps torch's group, and is out"


def test_ranks_that_never_come_are_named():
    from torch.distributed import HashStore

    store = HashStore()
    store.set("host/0", "node1")
    with pytest.raises(InputError, match=r"rank 1, 3; there are ranks on (node1, )?\S+"):
        fabric.meet(store, 2, 4, patience=0.2)


# --- the stage


def test_it_is_no_part_of_the_line(runs):
    row = stages.row("nccl-check")
    assert row.name not in stages.line()
    assert stages.before(row.name) == [], "it waits for nothing of its run"
    for name in stages.line():
        assert row.name not in stages.before(name), f"{name} would wait for it"
    said = launch("pipeline", RUN="x", DRY_RUN="1").stdout
    assert "nccl" not in said
    (runs / "x/data").mkdir(parents=True)
    assert "nccl-check" not in launch("status", RUN="x").stdout
    (runs / "y/nccl-check").mkdir(parents=True)
    shown = launch("status", RUN="y").stdout.splitlines()
    assert [line.split()[0] for line in shown[2:]] == ["nccl-check"]


def test_each_call_is_a_run_of_its_own(runs):
    said = launch("nccl-check", GPUS="2", DRY_RUN="1").stdout
    name = re.search(r"scripts\.nccl_check .*/([\w-]+)/nccl-check", said)[1]
    assert re.fullmatch(r"nccl-check-\d{4}-\d{6}", name)
    assert "/mine/nccl-check" in launch("nccl-check", GPUS="2", RUN="mine", DRY_RUN="1").stdout
    assert "MODEL" not in said, "no model and no config belongs to it"


@pytest.mark.slow
def test_two_ranks_on_this_machine(runs):
    said = make("nccl-check", GPUS="2").stdout
    for operation in ("all-reduce", "broadcast"):
        for size in (1, 4, 16):
            line = rf"{operation} +{size} MB +\d+\.\d\d GB/s"
            assert re.search(line, said), f"no line {line!r}:\n{said}"
    assert "transport: gloo over TCP sockets" in said
    assert "pairs: the slowest of 1 is rank 0 and rank 1" in said
    (run,) = runs_root().iterdir()
    summary = finished(run / "nccl-check")["summary"]
    assert [row["bytes"] >> 20 for row in summary["table"]] == [1, 4, 16] * 2
    for row in summary["table"]:
        wanted = row["bytes"] / row["seconds"] / 1e9  # of two ranks both factors are 1
        assert row["bandwidth"] == pytest.approx(wanted)
    shown = make("status", RUN=run.name).stdout
    assert re.search(r"nccl-check +done .*all-reduce \d\S* GB/s.* gloo over TCP sockets", shown)


@pytest.mark.slow
def test_efa_that_was_asked_for_and_not_used(runs, monkeypatch):
    monkeypatch.setenv("NCCL_NET", "AWS Libfabric")
    result = call_make("nccl-check", GPUS="2", RUN="efa")
    assert_refused(result, "NCCL_NET=AWS Libfabric asks for EFA, but sockets were used")
    assert "GB/s" in result.stdout, "the table is shown all the same"
    assert "sockets were used" in make("status", RUN="efa").stdout
    assert [attempt["exit"] for attempt in history(stage_dir("efa", "nccl-check"))] == [64]


PEER = """
import os, sys, signal
from datetime import timedelta
import torch.distributed as dist
from scripts.tools import fabric, fabric_pairs
number, port, patience = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
fabric.PATIENCE, fabric_pairs.SPARE = patience, 1.0
store = dist.TCPStore("127.0.0.1", port, 3, number == 0, timedelta(seconds=60))
fabric.meet(store, number, 3)
one = fabric.Fabric("gloo", fabric.ON_CPUS, 0)
names = ["node1", "node2", "node3"]
def exchange(*given):
    if number == 2:
        os.kill(os.getpid(), signal.SIGSTOP)  # as a process on a node that hangs
    return one.pair(*given)
fabric_pairs.Pairs(store, number, names, exchange, patience).run()
if number == 0:
    print(store.get("pairs").decode(), flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_a_node_that_hangs_in_its_exchange_is_named():
    """Three real processes over gloo, of which one is stopped when data should come."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, "-c", PEER]
    peers = [
        subprocess.Popen([*words, str(n), port, "12"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for n in range(3)
    ]
    try:
        found = json.loads(peers[0].communicate(timeout=120)[0])
    finally:
        for peer in peers:
            peer.kill()
            peer.wait()
    said = " | ".join(found["broken"])
    assert re.search(r"(node3 did not answer node[12])|(node[12] and node3 answer, but)", said)
    both = [p for p in found["pairs"] if (p["first"], p["second"]) == (0, 1)]
    assert both[0]["bandwidth"] > 0, f"node1 and node2 are well: {found}"
    assert "node1 did not" not in said
    assert "node2 did not" not in said

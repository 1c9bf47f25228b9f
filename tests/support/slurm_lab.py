"""A real Slurm on this machine, for tests: slurmctld and a few slurmd on loopback, each with GPUs
that are none.

    .venv/bin/python -m tests.support.slurm_lab FOLDER up|down

`up` prints the SLURM_CONF to export.

Needs Debian's slurmctld, slurmd, slurm-client and munge; no systemd, no cgroups. As root each node
has its own host name, its own /etc/hosts and a folder that no other sees (FOLDER/node-local), as
real nodes have.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.support import waiting
from tests.support.processes import all_pids, environment

CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_min_interval=0,sched_interval=2,bf_interval=2,batch_sched_delay=0,\
nohold_on_prolog_fail
MpiDefault=none
SwitchType=switch/none
GresTypes=gpu
SlurmdTimeout=10
InactiveLimit=0
KillWait=5
MinJobAge={min_job_age}
ReturnToService=1
MailProg=/bin/true
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
"""
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")


def missing() -> list[str]:
    """Return the programs that this machine lacks."""
    return [name for name in NEEDED if not shutil.which(name)]


class Lab:
    """Be slurmctld and `nodes` nodes node1, node2, …, on one address or on one each.

    `min_job_age`: seconds until squeue and scontrol forget a finished job.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 2,
        gpus: int = 2,
        one_address: bool = False,
        min_job_age: int = 300,
    ):
        self.folder, self.conf = folder, folder / "slurm.conf"
        self.names = [f"node{n + 1}" for n in range(nodes)]
        self.address = {
            name: "127.0.0.1" if one_address else f"127.0.1.{n + 1}"
            for n, name in enumerate(self.names)
        }
        self.gpus, self.min_job_age = gpus, min_job_age
        self.own_namespaces = os.geteuid() == 0

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.conf)}

    def up(self) -> None:
        """Start everything and wait until all nodes are idle."""
        socket_path = f"{self.folder}/spool.{self.names[-1]}/{self.names[-1]}_999.4294967291"
        assert len(socket_path) < 108, f"{self.folder}: too long: no step starts (unix(7))"
        for name in ("state", "node-local", *(f"spool.{n}" for n in self.names)):
            (self.folder / name).mkdir(parents=True)
        self._munge()
        port = self._write_conf()
        self._start("slurmctld", "-c")
        for name in self.names:
            self.start_node(name)
        deadline = time.monotonic() + 30
        while (
            self.ask("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N").split()
            != self.names
        ):
            assert time.monotonic() < deadline, (
                f"the nodes are not idle; slurmctld is on port {port}\n"
                + self.ask("sinfo", "-N", "-l")
            )
            time.sleep(0.1)

    def _munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.folder.chmod(0o755)
        files = {
            "socket": "munge.socket",
            "key-file": "munge.key",
            "log-file": "munged.log",
            "pid-file": "munged.pid",
            "seed-file": "munged.seed",
        }
        self._start(
            "munged",
            "--force",
            "--num-threads=2",
            *(f"--{option}={self.folder / name}" for option, name in files.items()),
        )

    def _write_conf(self) -> int:
        ports = _free_ports(len(self.names) + 1)
        text = CONF.format(
            host=socket.gethostname(),
            user=getpass.getuser(),
            folder=self.folder,
            port=ports[0],
            min_job_age=self.min_job_age,
        )
        for name, port in zip(self.names, ports[1:]):
            text += f"NodeName={name} NodeHostname={name} NodeAddr={self.address[name]} Port={port}"
            text += f" CPUs=64 RealMemory=500000 Gres=gpu:{self.gpus}\n"
        text += f"PartitionName=main Nodes={','.join(self.names)} Default=YES DefaultTime=60"
        text += " MaxTime=INFINITE\n"
        text += f"PartitionName=other Nodes={self.names[0]} MaxTime=INFINITE\n"
        self.conf.write_text(text)
        # Any character device passes for a GPU; a count alone leaves the node invalid.
        (self.folder / "gres.conf").write_text(f"Name=gpu File=/dev/tty[0-{self.gpus - 1}]\n")
        hosts = "127.0.0.1 localhost " + socket.gethostname() + "\n"
        (self.folder / "hosts").write_text(
            hosts + "".join(f"{a} {n}\n" for n, a in self.address.items())
        )
        return ports[0]

    def _start(self, *words: str) -> None:
        done = subprocess.run(
            words, env={**os.environ, **self.environment}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{words} did not start: {done.stderr}"

    def start_node(self, name: str) -> None:
        """Start one slurmd, in namespaces of its own where that is allowed."""
        words = ["slurmd", "-N", name]
        if self.own_namespaces:
            inside = [
                f"hostname {name}",
                f"mount --bind {self.folder}/hosts /etc/hosts",
                f"mount -t tmpfs none {self.folder}/node-local",
                f"exec {' '.join(words)}",
            ]
            words = ["unshare", "--mount", "--uts", "sh", "-ec", "; ".join(inside)]
        self._start(*words)

    def kill_node(self, name: str, number: int = signal.SIGKILL) -> None:
        """End slurmd and everything below its slurmstepd at once, as a node loses its power; with
        SIGSTOP it hangs."""
        slurmd = int((self.folder / f"slurmd.{name}.pid").read_text())
        for pid in [slurmd, *(pid for pid in all_pids() if self._is_on(name, pid))]:
            with contextlib.suppress(OSError):
                os.kill(pid, number)

    def _is_on(self, name: str, pid: int) -> bool:
        """Whether a process belongs to a job on a node of this cluster; another one here may have a
        node of this name."""
        process = Path(f"/proc/{pid}")
        with contextlib.suppress(OSError):
            if (
                process / "comm"
            ).read_text() == "slurmstepd\n":  # it holds its node's log or spool folder open
                files = [os.readlink(file) for file in (process / "fd").iterdir()]
                return any(
                    file.startswith(f"{self.folder}/") and f".{name}" in file for file in files
                )
        told = environment(pid)
        return (told.get("SLURMD_NODENAME"), told.get("SLURM_CONF")) == (name, str(self.conf))

    def ask(self, *words: str) -> str:
        """Return the output of a Slurm command; fail the test where it fails."""
        # A slurmctld that waits for a name server answers nobody for more than the 10 s of
        # MessageTimeout.
        for _ in range(6):
            done = subprocess.run(
                words, env={**os.environ, **self.environment}, capture_output=True, text=True
            )
            if "timed out" not in done.stderr:
                break
        assert done.returncode == 0, f"{words} failed: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Return a job's state, "" once Slurm has forgotten it."""
        done = subprocess.run(
            ["scontrol", "-o", "show", "job", job],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
        )
        return done.stdout.partition("JobState=")[2].partition(" ")[0]

    def down(self) -> None:
        """Cancel what runs, then end every daemon that `up` started."""
        subprocess.run(
            ["scancel", "--user", getpass.getuser()],
            env={**os.environ, **self.environment},
            capture_output=True,
        )
        time.sleep(1)
        pids = {}
        for file in [
            *self.folder.glob("slurmd.*.pid"),
            self.folder / "slurmctld.pid",
            self.folder / "munged.pid",
        ]:
            with contextlib.suppress(OSError, ValueError):
                pid = int(file.read_text())
                if Path(f"/proc/{pid}/comm").read_text().strip() in (
                    "slurmd",
                    "slurmctld",
                    "munged",
                ):
                    pids[pid] = True
                    os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def until(condition, seconds=120):
    """Wait for something to be true; returns it. Fails with the queue and the daemons' errors."""
    return waiting.until(condition, seconds, _queue_and_errors)


def _queue_and_errors() -> str:
    """Return the queue, and the last errors that this cluster's daemons logged."""
    queue = subprocess.run(["squeue"], capture_output=True, text=True).stdout
    logs = sorted(Path(os.environ.get("SLURM_CONF", "")).parent.glob("slurm*.log"))
    lines = [f"{log.name}: {line}" for log in logs for line in log.read_text().splitlines()[-200:]]
    return queue + "\n" + "\n".join(line for line in lines if "error" in line)[-3000:]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[2] not in ("up", "down"):
        sys.exit(__doc__)
    lab = Lab(Path(sys.argv[1]).resolve())
    {"up": lab.up, "down": lab.down}[sys.argv[2]]()
    if sys.argv[2] == "up":
        print(f"export SLURM_CONF={lab.conf}")

"""A real Kubernetes on this machine, for tests: a control plane, CoreDNS and a few nodes, each with
its own kubelet, containerd, kube-proxy, host name, network, processes and mounts, and with GPUs
that are none.

    .venv/bin/python -m tests.support.kube_lab FOLDER up [ADDON…]
    .venv/bin/python -m tests.support.kube_lab FOLDER down

`up` ends what runs in FOLDER, starts anew, and prints the PATH and the KUBECONFIG to export; `down`
removes what it made there. The nodes hold an image IMAGE that runs this repository.

The programs are built once, by kube/build.sh, and kept in ~/.cache/torch-relay/kube; after that
neither go nor the network is needed. Needs root; no systemd, no registry. Nothing is installed, and
nothing of the host is touched but cgroups named kubelab-*.

A pod with `runtimeClassName: host` and `image: localhost/host:1`, an empty tree, sees this
machine's /usr and the folders given as `mounts`, as .venv. Volumes of the class "shared", the
default, are folders in FOLDER/run/volumes that all nodes see. A dead node is NotReady after 8
seconds, and its pods are given up 5 seconds later. There is no Internet in pods and nodes.
"""

import contextlib
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from tests.support.kube import image
from tests.support.processes import words
from tests.support.runs import ROOT
from tests.support.waiting import until

KUBE = ROOT / "tests/support/kube"
TO_RUN = ("python3", "unshare", "nsenter", "ip", "sysctl", "openssl")
TO_BUILD = ("go", "apt-get", "dpkg")
CODE = "/opt/torch-relay"  # as in the image
IMAGE = "localhost/torch-relay:1"
API = "10.99.0.1:6443"  # in the cluster's own network


def missing() -> list[str]:
    """Return what this machine lacks to build or to run a cluster."""
    needed = TO_RUN if (_programs() / "done").exists() else TO_RUN + TO_BUILD
    lacks = [name for name in needed if not shutil.which(name)]
    return lacks + ["root"] * (os.geteuid() != 0)


def _programs() -> Path:
    """Return the folder of what kube/build.sh builds, which may not be there yet."""
    done = subprocess.run(
        ["bash", KUBE / "build.sh", "-k"], capture_output=True, text=True, check=True
    )
    return Path(done.stdout.strip())


def repository() -> dict[str, Path]:
    """Return what pods must see to run this repository as CODE, where the image has it: {path in
    the pod: folder here}. Not at its own path: /tmp is the pod's own, and a clone may lie there."""
    folders = [(ROOT / ".venv").resolve(), Path(sys.base_prefix).resolve()]
    return {CODE: ROOT, **{str(f): f for f in folders if ROOT not in f.parents}}


class KubeLab:
    """Be `nodes` nodes node1, node2, … with `gpus` pretended nvidia.com/gpu each.

    `mounts`: {path: folder here} that containers of RuntimeClass "host" see too, read-only.
    `images`: archives (docker save, kube/image.py) that every node holds. `addons`: of jobset,
    kueue, trainer (real controllers, in pods) and netpol (NetworkPolicies are enforced). `runtime`:
    the RuntimeClass of pods that name none, host or plain; with host, manifests run this machine's
    programs unchanged.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 2,
        gpus: int = 8,
        mounts: Mapping[str, Path] = MappingProxyType({}),
        images: Sequence[Path] = (),
        addons: Sequence[str] = (),
        runtime: str = "host",
    ):
        self.folder = folder.resolve()
        self.state = self.folder / "run"
        self.names = [f"node{n + 1}" for n in range(nodes)]
        self.gpus, self.runtime = gpus, runtime
        self.mounts = [f"{folder.resolve()}:{path}" for path, folder in mounts.items()]
        self.images = [image.resolve() for image in images]
        # Trainer needs JobSet's kinds. Kueue comes last: its webhook is asked about each Deployment
        # from then on, and must be up.
        self.addons = sorted(addons, key=["netpol", "jobset", "trainer", "kueue"].index)
        self._programs = _programs()
        self._cgroup = "kubelab-" + hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]
        self._children: list[subprocess.Popen] = []

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self._programs / 'bin'}:{os.environ['PATH']}",
            "KUBECONFIG": str(self.state / "kubeconfig"),
        }

    def up(self) -> None:
        """Build what is not built yet, start everything, and wait until all nodes are ready."""
        assert len(str(self.folder)) <= 60, f"{self.folder}: too long for a socket's path (unix(7))"
        self.down()  # what an up that was cut off has left
        command = ["bash", KUBE / "build.sh", *self.addons]
        done = subprocess.run(command, stdout=subprocess.PIPE)
        assert done.returncode == 0, "build.sh failed"
        (self.state / "log").mkdir(parents=True)
        self._write_conf()
        namespaces = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"]
        control = ["--mount-proc", "bash", str(KUBE / "control.sh"), "up", str(self.state)]
        pid = self._start("control", *namespaces, *control)
        (self.state / "pid").write_text(str(pid))
        until(self._pid, 10, self.said)  # /proc shows no command line in the moment of its start
        self._await("api")
        listen = ["listen", self._init(), API, str(self.state / "port")]
        self._start("relay", str(self._programs / "bin/labd"), *listen)
        port = self._await("port")
        config = (self.state / "admin.conf").read_text()
        (self.state / "kubeconfig").touch(mode=0o600)
        (self.state / "kubeconfig").write_text(config.replace(API, f"127.0.0.1:{port}"))
        self._await("up")
        for addon in self.addons:
            self.add(addon)

    def _write_conf(self) -> None:
        values = {
            "B": self._programs,
            "R": self.state,
            "ID": self._cgroup,
            "NODES": len(self.names),
            "GPUS": self.gpus,
            "RUNTIME": self.runtime,
            "NETPOL": "1" if "netpol" in self.addons else "",
        }
        lists = {"MOUNTS": self.mounts, "IMAGES": [*self.images, *self._own_image()]}
        lines = [f"{name}={shlex.quote(str(value))}" for name, value in values.items()]
        lines += [f"{name}=({shlex.join(map(str, value))})" for name, value in lists.items()]
        (self.state / "conf").write_text("\n".join(lines) + "\n")

    def _own_image(self) -> list[Path]:
        """Write the image that runs this repository, where pods see it; it holds nothing itself."""
        if not any(mount.endswith(f":{CODE}") for mount in self.mounts):
            return []
        archive = self.state / "torch-relay.tar"
        path = f"PATH={CODE}/.venv/bin:/usr/bin:/bin"
        # One thread: two ranks share the cores, and comparisons to the last bit want one number.
        env = [path, "OMP_NUM_THREADS=1"]
        # The repository is another user's there; without this git says no commit.
        env += ["GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*"]
        words = [word for one in env for word in ("--env", one)]
        image.main([str(archive), IMAGE, "--folder", CODE, *words, "--skeleton"])
        return [archive]

    def add(self, addon: str) -> None:
        """Give all nodes an add-on's image, apply its manifest, and wait for its controller."""
        subprocess.run(["bash", KUBE / "build.sh", addon], stdout=subprocess.PIPE, check=True)
        folder = self._programs / "addons" / addon
        if not (folder / "manifest.yaml").exists():  # netpol runs on nodes, from their start
            return
        for name in self.names:
            store = ["-a", str(self.state / name / "containerd.sock"), "-n", "k8s.io", "images"]
            ctr, archive = str(self._programs / "bin/ctr"), str(folder / "image.tar")
            self._inside(*self._on_node(name), ctr, *store, "import", archive)
        self.kubectl("apply", "--server-side", "-f", str(folder / "manifest.yaml"))
        available = ["--for=condition=Available", "--timeout=300s"]
        self.kubectl("wait", *available, "-A", "--all", "deploy")

    def _start(self, log: str, *command: str) -> int:
        """Start something that outlives this process. Returns its pid."""
        with (self.state / "log" / f"{log}.log").open("a") as file:
            child = subprocess.Popen(
                command,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._children.append(child)
        return child.pid

    def _await(self, name: str) -> str:
        """Wait for a file of the cluster's, as long as the cluster lives. Returns its text."""
        file = self.state / name

        def there():
            assert self._pid(), f"the cluster ended:\n{self.said()}"
            return file.exists() and file.read_text().strip()

        return until(there, 300, self.said)

    def said(self) -> str:
        """Return the last lines of the logs, the control plane's own last."""
        logs = sorted((self.state / "log").glob("*.log"), key=lambda log: log.name == "control.log")
        ends = [(log.name, line) for log in logs for line in log.read_text().splitlines()[-4:]]
        return "\n".join(f"{name}: {line[:300]}" for name, line in ends)

    def _pid(self) -> int:
        """Return the parent of the cluster's namespaces, 0 where it does not live."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.state / "pid").read_text())
            if str(self.state) in words(pid):
                return pid
        return 0

    def _init(self) -> str:
        """Return the pid of the first process inside the namespaces."""
        pid = self._pid()
        assert pid, f"no cluster runs in {self.folder}"
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]

    def _inside(self, *command: str) -> str:
        """Run something in the control plane's namespaces; return what it printed."""
        enter = ["nsenter", "-t", self._init(), "-m", "-n", "-p", *command]
        done = subprocess.run(enter, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"{command} failed: {done.stderr}"
        return done.stdout.strip()

    def _on_node(self, name: str) -> list[str]:
        """Return the words that run what follows on a node, for _inside."""
        pid = (self.state / name / "pid").read_text().strip()
        first = self._inside("cat", f"/proc/{pid}/task/{pid}/children").split()[0]
        return ["nsenter", "-t", first, "-m", "-n", "-p", "-u"]

    def _log(self, name: str, *command: str) -> None:
        """Start something inside that writes to a node's log."""
        log = shlex.quote(str(self.state / "log" / f"{name}.log"))
        self._inside("setsid", "sh", "-c", f"exec {shlex.join(command)} >> {log} 2>&1")

    def kill_node(self, name: str) -> None:
        """End all processes of a node at once, as it loses its power."""
        self._inside("kill", "-9", (self.state / name / "pid").read_text().strip())

    def start_node(self, name: str) -> None:
        """Boot a node that was killed."""
        boot = [str(KUBE / "control.sh"), "boot", str(self.state), name[len("node") :]]
        self._log(name, "bash", *boot)

    def stop_kubelet(self, name: str) -> None:
        """Kill a node's kubelet alone; its containers live on."""
        pid = (self.state / name / "kubelet.pid").read_text().strip()
        self._inside(*self._on_node(name), "kill", "-9", pid)

    def start_kubelet(self, name: str) -> None:
        """Start a kubelet that was stopped."""
        start = [str(KUBE / "node.sh"), "kubelet", str(self.state), name[len("node") :]]
        self._log(name, *self._on_node(name), "bash", *start)

    def kubectl(self, *command: str, input: str = "") -> str:
        """Return the output of kubectl; fail the test where it fails."""
        done = subprocess.run(
            ["kubectl", *command],
            env={**os.environ, **self.environment},
            input=input,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"kubectl {command} failed: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def down(self) -> None:
        """End every process that `up` started, and remove what it made but the built programs."""
        if pid := self._pid():
            init = Path("/proc", self._init())
            os.kill(pid, signal.SIGKILL)  # unshare --kill-child: takes all namespaces with it
            deadline = time.monotonic() + 10
            while init.exists() and time.monotonic() < deadline:
                time.sleep(0.1)
        for child in self._children:
            child.wait(timeout=10)
        self._children = []
        for root in [Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*/")]:
            _remove_cgroup(root / self._cgroup)
        shutil.rmtree(self.state, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # unless there is something else in it


def _remove_cgroup(folder: Path) -> None:
    """Remove a cgroup and those below it, which stay busy for a moment after their last process."""
    deadline = time.monotonic() + 2
    while folder.exists() and time.monotonic() < deadline:
        for path, _, _ in os.walk(folder, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(path)
        time.sleep(0.05)


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[2] not in ("up", "down"):
        sys.exit(__doc__)
    lab = KubeLab(Path(sys.argv[1]), mounts=repository(), addons=sys.argv[3:])
    if sys.argv[2] == "down":
        lab.down()
    else:
        lab.up()
        for name, value in lab.environment.items():
            print(f"export {name}={shlex.quote(value)}")

"""CLUSTER=k8s: kubectl around the files of kubernetes/. A stage is one Job, `<run>-<stage>`; its
name is the lock. The runs are on a volume that this machine need not see: RUNS here holds what was
submitted and a copy of the run's small files, which a pod of the site, the desk, reads."""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Optional

from scripts.clusters import kubernetes_chain as chain
from scripts.clusters import kubernetes_service as service
from scripts.clusters.interface import Cluster, Job, Started
from scripts.clusters.kubectl import Kubectl, in_words
from scripts.clusters.kubernetes_bring import Bringer
from scripts.clusters.kubernetes_chain import Chain, ended
from scripts.clusters.kubernetes_copy import NAME, RunCopy
from scripts.clusters.kubernetes_pods import Pods
from scripts.clusters.kubernetes_service import Services
from scripts.clusters.kubernetes_text import VOLUME, kustomization
from scripts.run import attempts, stages, suites
from scripts.run.errors import DONE, FAULT, InputError
from scripts.run.files import read_env, read_json, write_atomic, write_json
from scripts.run.layout import Run, finished, from_fact, relative, run_of
from scripts.run.submission import Submission

MOST_BYTES = 1 << 20  # of a ConfigMap (1 MiB, API server)
WAITS = "waits for its pods"
SAVE_GRACE, CANCEL_GRACE = 600, 60  # seconds


class Kubernetes(Cluster):
    """Create stages as Jobs in a namespace. Needs kubectl, a context, and kubernetes/site."""

    name = NAME
    listens = "0.0.0.0"  # noqa: S104  in its pod; a NetworkPolicy and a key stand before it
    sees_runs = False
    names_services = True

    @functools.cached_property
    def kubectl(self) -> Kubectl:
        """Call kubectl in the site's namespace."""
        return Kubectl(self.environment)

    @functools.cached_property
    def bringer(self) -> Bringer:
        """Bring files of this machine to the volume."""
        return Bringer(self.kubectl)

    @functools.cached_property
    def services(self) -> Services:
        """Ask and change what serves in the namespace."""
        return Services(self.kubectl)

    @functools.cached_property
    def chain(self) -> Chain:
        """Make stages wait for one another on the cluster."""
        return Chain(self.kubectl)

    @functools.cached_property
    def copy(self) -> RunCopy:
        """Read the runs on the volume, which this machine does not see."""
        return RunCopy(self.environment, self.kubectl)

    def problems(self, submission: Submission, dry_run: bool) -> list[str]:
        """List what keeps a stage out of the cluster: paths that pods do not see, its size, and,
        asked of the API server in one dry run, whatever that refuses."""
        row, found = submission.row, []
        if row.serves:
            found += service.problems(submission)
        for fact in ("DATA", "VALIDATION", "FROM", *suites.staged_facts(submission.facts)):
            path = submission.facts.get(fact, "")
            if path.startswith("/") and not path.startswith(f"{VOLUME}/"):
                found.append(f"{fact}={path}: neither here nor below {VOLUME}, which pods see")
        size = sum(len(text.encode()) for text in submission.files.values())
        if size > MOST_BYTES:
            found.append(f"{row.name}: the submission has {size:,} bytes, {MOST_BYTES:,} may be")
        if found or dry_run:
            self.kubectl.namespace  # noqa: B018  what the site's file lacks is said in a dry run, too
            return found
        if not shutil.which("kubectl", path=self.environment.get("PATH")):
            return ["kubectl: not on PATH; https://kubernetes.io/docs/tasks/tools/ installs it"]
        if submission.nodes > 1:
            found = self.kubectl.sharing_problems(submission.nodes)
        return found or self.kubectl.rights_problems or self._refusal(submission)

    def _refusal(self, submission: Submission) -> list[str]:
        """Ask the API server what it would say: a field, a quota, a right that lacks."""
        with tempfile.TemporaryDirectory() as folder:
            for name, text in submission.files.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            if submission.row.serves:
                downtime = self.environment.get("DOWNTIME", "0") not in ("", "0")
                found = self.services.refusal(submission, Path(folder), downtime)
                if found:
                    return found
            asked = kustomization(submission, Path(folder))
            Path(folder, "kustomization.yaml").write_text(asked, encoding="utf-8")
            shown = r"jsonpath={.metadata.labels.kueue\.x-k8s\.io/queue-name}"
            done = self.kubectl.call("create", "--dry-run=server", "-k", folder, "-o", shown)
        lines = [line for line in done.stderr.splitlines() if "already exists" not in line]
        said = in_words("\n".join(lines)) if done.returncode else ""
        if said:
            return [f"the API server refuses {submission.row.name}: {said}"]
        return self.kubectl.queue_problems(done.stdout.strip()) if done.stdout.strip() else []

    # --- submission ---

    def place(self, fact: str, run: Run) -> str:
        """Return where pods will find a path of this machine; one on the volume is there."""
        path = from_fact(fact, run.root)
        there = fact.startswith(("runs/", f"{VOLUME}/", "hf://")) or not path.exists()
        return fact if there else self.bringer.place(path, run)

    def render(self, submission: Submission, after: str = "") -> str:
        """Format the kustomization that is written beside the stage's files, and the command."""
        file = shlex.quote(relative(submission.directory / "kustomization.yaml"))
        written = self.bringer.lines(submission.facts)
        written += f"cat > {file} << 'EOF'\n{kustomization(submission)}EOF"
        if submission.row.serves:
            written += f"\n{service.lines(submission, self.kubectl.namespace)}"
        return f"{written}\n{chain.lines(submission, after)}"

    def submit(self, submission: Submission, after: str = "") -> Started:
        """Create the Job, or make it wait on the cluster for another. Raises InputError if the API
        server refuses it, or has one of its name that has not ended."""
        directory, job = submission.directory, f"{submission.run.name}-{submission.row.name}"
        old = self.kubectl.get("job", job)
        if old and not ended(old):
            raise InputError(f"job {job}: submitted already; make status RUN={submission.run.name}")
        if old:
            self.kubectl.must("delete", "job", job, "--cascade=foreground", "--wait=true")
        self.copy.mark(submission.run)
        self.bringer.bring(submission.facts)
        submission.write(chain.create(directory))
        write_atomic(directory / "kustomization.yaml", kustomization(submission))
        if submission.row.serves:
            self.services.make_key(submission)
            self.services.write(submission, directory)
        if after:
            self.chain.add(submission, after)
            content = {"cluster": self.name, "job": job, "submitted": time.time()}
            write_json(directory / "job.json", content)
            print(f"{submission.row.name}: job {job} waits for {after}", flush=True)
            return Started(0, job)
        done = self.kubectl.call("create", "-k", relative(submission.directory), timeout=60)
        made = self.kubectl.get("job", job)
        # The same ConfigMap may be there already: its name holds its digest.
        wrong = re.sub(r".*configmaps.*already exists\n?", "", done.stderr).strip()
        if made is None or (done.returncode and wrong):
            said = in_words(wrong) or "no job of that name was made"
            raise InputError(f"the API server refuses {job}: {said}")
        self._own_maps(job, made)
        self.chain.conduct(submission.run)
        content = {"cluster": self.name, "job": job, "uid": made["metadata"]["uid"]}
        write_json(directory / "job.json", {**content, "submitted": time.time()})
        see = f"make status RUN={submission.run.name}"
        print(f"{submission.row.name}: job {job}; {see}", flush=True)
        return self._rolled_out(submission, job) if submission.row.serves else Started(0, job)

    def _rolled_out(self, submission: Submission, job: str) -> Started:
        """Wait until a service answers, or its pods have been taken back."""
        code = self.services.follow(job, ended)
        self.fetch(submission.run)
        past = attempts.history(submission.directory)
        said = past[-1].get("error") if past else f"job {job} did not begin"
        if code != DONE:
            print(f"{submission.row.name}: {said}", file=sys.stderr)
        return Started(DONE if code == DONE else FAULT)

    def _own_maps(self, job: str, made: dict[str, Any]) -> None:
        """Let the submission go with its Job."""
        spec = made["spec"]["template"]["spec"]
        maps = [v["configMap"]["name"] for v in spec["volumes"] if "configMap" in v]
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job}
        owner["uid"] = made["metadata"]["uid"]
        patch = json.dumps({"metadata": {"ownerReferences": [owner]}})
        for name in maps:
            self.kubectl.must("patch", "configmap", name, "--patch", patch)

    # --- afterwards ---

    def jobs(self, run: Run) -> dict[str, Job]:
        """Ask once for the run's Jobs and pods."""
        if not self.copy.concerns(run):
            return {}
        shown = self.kubectl.must(
            "get",
            "jobs,pods,configmaps,deployments",
            "-l",
            f"torch-relay/run={run.name}",
            "-o",
            "json",
        )
        items = json.loads(shown)["items"]
        found = {}
        for stage in stages.names():
            job = f"{run.name}-{stage}"
            of = [i for i in items if i["metadata"]["labels"].get("torch-relay/stage") == stage]
            there = next((i for i in of if i["kind"] == "Job"), None)
            attempt = attempts.running(run.stage(stage))
            served = next((i for i in items if i["kind"] == "Deployment"), None)
            if stages.row(stage).serves and served and (not there or ended(there)):
                ready = served.get("status", {}).get("readyReplicas", 0)
                name, wanted = served["metadata"]["name"], served["spec"]["replicas"]
                note = f"service {name}: {ready} of {wanted} pods are ready"
                found[stage] = Job(self.name, name, "running", note)
            elif there:
                pods = Pods([i for i in of if i["kind"] == "Pod"])
                found[stage] = self._job(run.stage(stage), job, there, pods)
                if attempt and ended(there):
                    why = f"job {job} has ended"
                    found[stage] = found[stage]._replace(lost=attempt, why=why)
            elif waits := next((i for i in of if i["kind"] == "ConfigMap"), None):
                after = waits["metadata"]["annotations"]["torch-relay/after"]
                found[stage] = Job(self.name, job, "queued", f"job {job} waits for {after}")
            elif (read_json(run.stage(stage) / "job.json") or {}).get("cluster") == self.name:
                began, why = attempts.history(run.stage(stage)), chain.last_words(items)
                why = why or f"job {job} {'was deleted' if began else 'left before it began'}"
                found[stage] = Job(self.name, job, "cancelled", why)
                if began:
                    found[stage] = Job(self.name, job, "", "", lost=attempt, why=why)
        return found

    def _job(self, directory: Path, job: str, made: dict[str, Any], pods: Pods) -> Job:
        end = ended(made)
        if finished(directory) or (end and attempts.history(directory)):
            return Job(self.name, job, "", "")
        if end:
            return Job(self.name, job, "failed", f"job {job}: {pods.last_words or end}")
        if made["spec"].get("suspend"):
            why = self.kubectl.admission(made) or "suspended, until a queue admits it"
            return Job(self.name, job, "queued", f"job {job}: {why}")
        if pods.running and not pods.stuck:
            return Job(self.name, job, "running", f"job {job} on {', '.join(pods.nodes)}")
        return Job(self.name, job, "queued", f"job {job}: {pods.stuck or pods.waiting or WAITS}")

    def fetch(self, run: Run) -> None:
        """Copy the run's small files from the volume, by the desk."""
        self.copy.fetch(run)

    def beside(self, run: Run, verb: str) -> Optional[tuple[int, str]]:
        """Run the image's own launcher in the desk."""
        return self.copy.beside(run, verb)

    def remove(self, path: Path, run: Run) -> None:
        """Remove a run or a stage on the volume, and its Jobs, which have ended."""
        if self.copy.concerns(run):
            self.copy.remove(path, run)
            one = "" if path == run.directory else f",torch-relay/stage={path.name}"
            label = f"torch-relay/run={run.name}{one}"
            self.kubectl.must("delete", "jobs,configmaps", "-l", label, "--wait=true")

    def service_state(self, directory: Path) -> str:
        """Say whether a run's model is served, by the service that it was deployed as."""
        return self.services.state(directory) if self.copy.concerns(run_of(directory)) else ""

    def address(self, directory: Path) -> str:
        """Return a service's URL in the cluster."""
        return self.services.url(directory) if self.copy.concerns(run_of(directory)) else ""

    def reach(self, directory: Path) -> str:
        """Open a way to a run's service from here."""
        return self.services.tunnel(directory) if self.copy.concerns(run_of(directory)) else ""

    def key(self, directory: Path) -> str:
        """Read the API's key from the service's Secret."""
        return self.services.key(read_env(directory / "stage.env")["SERVICE"])

    def earlier(self, service: str) -> str:
        """Return the run that served before the one that serves now."""
        return self.services.earlier(service)

    def stop(self, directory: Path, save: bool) -> None:
        """Delete the stage's Job: its pods get SIGTERM and save within their grace."""
        job = f"{directory.parent.name}-{directory.name}"
        named = f"batch.kubernetes.io/job-name={job}"
        self.chain.take(run_of(directory), directory.name)
        if stages.row(directory.name).serves:
            self.services.end(directory)
        if self.kubectl.get("job", job) is None:
            return
        self.kubectl.must("delete", "job", job, "--cascade=foreground", "--wait=false")
        if not save:
            self.kubectl.must("delete", "pods", "-l", named, "--grace-period=1", "--wait=false")
        deadline = time.monotonic() + (SAVE_GRACE if save else CANCEL_GRACE)
        while self.kubectl.get("job", job) is not None:
            if time.monotonic() > deadline:
                see = f"kubectl -n {self.kubectl.namespace} get pods -l {named}"
                raise InputError(f"job {job} is deleted, but its pods have not gone; {see}")
            time.sleep(0.5)

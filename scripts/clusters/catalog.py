"""The clusters that there are, by the name that CLUSTER= gives."""

from __future__ import annotations

from scripts.clusters.interface import Cluster
from scripts.clusters.kubernetes import Kubernetes
from scripts.clusters.local import Local
from scripts.clusters.slurm import Slurm

CLUSTERS: dict[str, type[Cluster]] = {kind.name: kind for kind in (Local, Slurm, Kubernetes)}

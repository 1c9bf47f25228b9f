"""Inside the job: the parent, its ranks, the meeting of nodes, progress.

The stage scripts and scripts.tools import this room. It imports scripts.run and the standard
library: what needs torch or an upstream tool is in scripts.tools.
"""

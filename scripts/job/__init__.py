"""Inside the job: the parent, its ranks, the meeting of nodes, progress.

Stage scripts and scripts.tools import it. It imports scripts.run and the standard library.
"""

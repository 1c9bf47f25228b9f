"""How a job gets to where it runs: one module a cluster, behind one interface (interface.py).

scripts.launcher imports this room. It imports scripts.run and the standard library alone and runs
on Python 3.9.
"""

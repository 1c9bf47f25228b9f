"""How a job gets to where it runs: one module a cluster, behind one interface.

The launcher imports it. It imports scripts.run and the standard library, Python 3.9 or newer.
"""

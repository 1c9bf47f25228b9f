"""Before the job: options → plan → start or show; status, logs, lineage, stop, clean, chat.

scripts/launch.py imports this room. It imports scripts.clusters, scripts.run and the standard
library alone and runs on Python 3.9. Only options.py reads the user's environment.
"""

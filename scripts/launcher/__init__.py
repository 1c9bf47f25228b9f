"""Before the job: options, plan, start or show; status, logs, lineage, chat.

scripts.launch imports it. It imports scripts.clusters, scripts.run and the standard library, Python 3.9 or newer.
"""

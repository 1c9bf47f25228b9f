"""A run is a directory: its layout, files, attempts, submission, model directory, gate and exit codes.

Both sides import it, the launcher and the job. It imports the standard library alone, Python 3.9 or newer.
"""

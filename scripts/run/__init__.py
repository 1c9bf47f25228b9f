"""A run is a directory: its layout, files, attempts, submission, model directory, gate, exit codes.

Both sides import this room, the launcher and the job. It imports the standard library alone and
runs on Python 3.9.
"""

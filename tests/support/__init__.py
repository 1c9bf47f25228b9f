"""Helpers that test files share: launching, runs, models, kills, a small Slurm."""

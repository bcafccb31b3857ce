"""Tests of the job scripts on a real Slurm."""

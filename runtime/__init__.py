"""Carry a run on any hardware: settings, ranks, output folder, resuming, planning."""

import os

# Threads that wait for each other sleep. By default they spin, and a small model on a busy machine
# takes six times the processor time. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

"""Carry a run on any hardware: settings, ranks, output folder, resuming, planning."""

"""Trainers of others, run with our rows, tracking, lineage and delta output."""

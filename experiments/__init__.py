"""Drivers: one question each, from flags to a table. Run as `python -m experiments.NAME`."""

"""Processes and machines: ranks, coordination, sharding, settings, threads."""

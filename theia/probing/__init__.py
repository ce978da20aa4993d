"""Probes: what can be read from frozen features."""

"""Behaviour cloning on a Theia encoder: ``python -m examples.behaviour_cloning --help``."""

"""Behaviour cloning on a Theia encoder, in plain PyTorch: ``python -m examples.behaviour_cloning --help``."""

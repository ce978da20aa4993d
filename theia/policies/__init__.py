"""Policies on top of an encoder: heads, their training by behaviour cloning, and the folder that a robot runs."""

from typing import Literal

# Here, since a command line does not load torch.
HeadKind = Literal["mlp", "chunk", "diffusion"]

"""Where everything of a run lies in its folder."""

import re
from dataclasses import dataclass
from pathlib import Path

from theia.probing.datasets import fingerprint

RECORD = "run.json"
POLICY = "policy.pt"
ENCODER = "encoder.json"
SHIFT = "shift-"  # and the factor: rollouts of a finished policy where one thing looks different


@dataclass(frozen=True)
class RunFiles:
    """The files of a run.

    Attributes:
        out: Folder of the run.
    """

    out: Path

    @property
    def policies(self) -> Path:
        """Folder of all policies."""
        return self.out / "policies"

    @property
    def embeddings(self) -> Path:
        """Folder of tokens that were computed once."""
        return self.out / "embeddings"

    def encoder(self, label: str) -> Path:
        """Record of an encoder, by which its weights can be told again."""
        return self.policies / _file_name(label) / ENCODER

    def policy(self, label: str, task: str, seed: int) -> Path:
        """Folder of one policy."""
        return self.policies / _file_name(label) / task / f"seed-{seed}"

    def shift(self, label: str, task: str, seed: int, factor: str) -> Path:
        """Rollouts of a finished policy where one thing looks different."""
        return self.policy(label, task, seed) / f"{SHIFT}{factor}.json"

    def video(self, label: str, task: str, seed: int, factor: str | None, number: int) -> Path:
        """Video of one rollout of a finished policy, or of one where one thing looks different."""
        shift = "" if factor is None else f"-{SHIFT}{factor}"
        return self.out / "videos" / f"{_file_name(label)}-{task}-seed-{seed}{shift}-rollout-{number:02d}.mp4"


def _file_name(label: str) -> str:
    """A label as the name of a folder; two labels never share one."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", label)
    return plain if plain == label else f"{plain}-{fingerprint(label)[:6]}"

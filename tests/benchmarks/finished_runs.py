"""Files as the command run leaves them."""

import json
from pathlib import Path


def write(folder: Path, encoder: str, task: str, seed: int, evaluations: dict[int, list[int]], **more: object) -> None:
    """Files as the command run leaves them; more replaces parts of the last."""
    for epoch, outcomes in evaluations.items():
        record = {
            "encoder": encoder, "task": task, "seed": seed, "epoch": epoch, "last": epoch == max(evaluations),
            "losses": [0.5] * (epoch + 1), "training seconds": 1.0, "rollout seconds": 2.0, "steps": 10,
            "rollouts": [
                {"seed": 50 + place, "success": bool(one), "first_success": 3 if one else None, "steps": 5,
                 "beginning": {"positions": [0.0, place]}}
                for place, one in enumerate(outcomes)
            ],
        } | (more if epoch == max(evaluations) else {})  # fmt: skip
        path = folder / "policies" / encoder.replace(":", "_") / task / f"seed-{seed}" / f"rollouts-{epoch:03d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))


def write_scores(folder: Path, encoder: str, task: str, values: list[float]) -> None:
    rollouts = [
        {"seed": 50 + place, "success": None, "first_success": None, "steps": 1000, "rewards": 1000 * value,
         "value": value, "beginning": {"positions": [0.0, place]}}
        for place, value in enumerate(values)
    ]  # fmt: skip
    write(folder, encoder, task, 100, {9: [0] * len(values)}, rollouts=rollouts)

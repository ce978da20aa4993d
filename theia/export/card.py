"""The model card: where a model comes from, under which licences, how good it is, and how to load it."""

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from theia.encoder.encoder import Encoder
from theia.models.architecture import Architecture
from theia.models.backbone import THEIA_SHAPES, TIMM

_ORIGIN = """## Origin

The published model `{origin}`, in another form. Its training, figures and licence are stated where it was published;
the licence of the published Theia models allows non-commercial use only.
"""

# From the most liberal to the strictest; a licence that is not here counts as stricter than all of them.
_LICENCES = (
    "none",
    "public domain",
    "CC0-1.0",
    "MIT",
    "BSD-3-Clause",
    "Apache-2.0",
    "CC-BY-4.0",
    "CC-BY-SA-4.0",
    "CC-BY-NC-4.0",
)
_UNKNOWN = "not recorded"

_HEAD = """---
library_name: theia
pipeline_tag: image-feature-extraction
tags: [theia, robotics, distillation, vision]
license: {licence}
---

# {title}

A visual encoder, {backbone}, that was distilled from {teachers}. It turns an image into spatial tokens for a robot
policy.

## Use

```python
import theia

encoder = theia.load("PATH_OR_ID")
features = encoder.forward_features(images)  # uint8 (B, H, W, 3); {sizes}
features.patches  # (B, N, {width}), N = H/{stride} * W/{stride}
encoder(images, pool="mean")  # (B, {width})
encoder.translate(images)  # the teachers' features as the student predicts them
```

With transformers: `import theia`, then `AutoModel.from_pretrained("PATH_OR_ID")`.
"""


def text(
    encoder: Encoder, architecture: Architecture, record: Mapping[str, Any], formats: Mapping[str, str] | None = None
) -> str:
    """A model card in Markdown.

    Args:
        encoder: Model that the card describes.
        architecture: Architecture of the model.
        record: Record of its training. Every entry is optional: ``teachers`` (by name: ``weights``, ``revision``,
            ``licence``), ``data`` (``name``, ``images``, ``manifest_sha256``), ``recipe`` (options of the training by
            name), ``changes`` (made when the run was resumed: ``step``, ``option``, ``old``, ``new``), ``held_out`` (by
            teacher: figures by name), ``held_out_images``, ``versions``, ``git_commit``. For a published model, only
            ``origin``, its name.
        formats: Descriptions of the other formats in the folder, by format, a phrase each.
    """
    known = record.get("teachers", {})
    rows = []
    for name, shape in architecture.teachers.items():
        teacher = known.get(name, {})
        rows.append(
            (
                name, "{}x{}".format(*shape["grid_hw"]), shape["channels"], teacher.get("weights") or _UNKNOWN,
                teacher.get("revision") or _UNKNOWN, teacher.get("licence") or _UNKNOWN,
            )
        )  # fmt: skip
    student = encoder.distiller.student
    backbone = student.backbone
    strictest = strictest_licence([row[-1] for row in rows])
    origin = record.get("origin")
    parts = [
        _HEAD.format(
            # Names of the hub; "other" is its name for whatever it has none for.
            licence=strictest.lower() if strictest in _LICENCES[2:] and origin is None else "other",
            title=f"Theia {_size(architecture)}",
            teachers=", ".join(architecture.teachers) or _UNKNOWN,
            width=encoder.width,
            backbone=_backbone(architecture),
            stride=backbone.stride,
            sizes=(
                f"sides are multiples of {backbone.stride}"
                if backbone.any_size
                else "of {} x {} pixels".format(*backbone.image_hw)
            ),
        ),
        _others(formats or {}),
        "## Student\n",
        _table(
            [
                ("backbone", _backbone(architecture)),
                ("parameters", f"{sum(p.numel() for p in student.parameters()):,}"),
                ("width, blocks", f"{encoder.width}, {encoder.depth}"),
                (
                    "trained at",
                    f"{architecture.image_size} x {architecture.image_size} pixels, patches of {backbone.stride}",
                ),
                ("tokens beside the patches", backbone.prefix),
                ("began as", _start(architecture)),
            ],
            ("", ""),
        ),
        "## Teachers\n",
        _table(rows, ("teacher", "grid", "channels", "weights", "revision", "licence")),
    ]
    if origin is not None:
        return "\n".join([*parts, _ORIGIN.format(origin=origin)])
    parts += [
        f"The strictest of the teachers' licences: **{strictest}**. Whether a student is bound by them is for you to "
        "judge.\n",
        "## Training\n",
        _data(record.get("data", {})),
        _table(sorted(record.get("recipe", {}).items()), ("option", "value")) or f"The recipe is {_UNKNOWN}.\n",
        _changes(record.get("changes", [])),
        _versions(record),
        "## Held-out figures\n",
        _figures(record.get("held_out", {}), record.get("held_out_images")),
    ]
    return "\n".join(part for part in parts if part)


def strictest_licence(licences: list[str]) -> str:
    """The licence that allows least; one that is not known here counts as the strictest.

    Args:
        licences: Licences, each as an SPDX id or in a few words.
    """
    if not licences:
        return _UNKNOWN
    return max(licences, key=lambda licence: _LICENCES.index(licence) if licence in _LICENCES else len(_LICENCES))


def _size(architecture: Architecture) -> str:
    return (
        architecture.backbone.removeprefix(TIMM)
        if architecture.backbone.startswith(TIMM)
        else "custom"
        if any((architecture.width, architecture.depth, architecture.heads, architecture.lift, architecture.wide_last))
        else architecture.backbone.removeprefix("theia_").capitalize()
    )


def _backbone(architecture: Architecture) -> str:
    if architecture.backbone in THEIA_SHAPES:
        return "a vision transformer"
    stage = "" if architecture.backbone_stage is None else f", stage {architecture.backbone_stage}"
    return f"timm's {architecture.backbone.removeprefix(TIMM)}{stage}"


def _start(architecture: Architecture) -> str:
    if architecture.weights == "scratch":
        return "random weights"
    return "a pretrained DeiT" if architecture.backbone in THEIA_SHAPES else "timm's pretrained weights"


def _table(rows: list[Any], headers: tuple[str, ...]) -> str:
    return str(tabulate(rows, headers, tablefmt="github", disable_numparse=True)) + "\n" if rows else ""


def _data(data: Mapping[str, Any]) -> str:
    if not data:
        return f"The data are {_UNKNOWN}.\n"
    images = "" if data.get("images") is None else f"{data['images']:,} images of "
    return (
        f"{images}feature store `{data.get('name', _UNKNOWN)}`, manifest sha256 "
        f"`{data.get('manifest_sha256', _UNKNOWN)}`.\n"
    )


def _changes(changes: Sequence[Mapping[str, Any]]) -> str:
    if not changes:
        return ""
    rows = [tuple(change[name] for name in ("step", "option", "old", "new")) for change in changes]
    return "Changed when the training was resumed:\n\n" + _table(rows, ("from step", "what", "until then", "from then"))


def _others(formats: Mapping[str, str]) -> str:
    if not formats:
        return ""
    return "In other forms in this folder:\n\n" + "".join(f"- {line}.\n" for line in formats.values())


def _versions(record: Mapping[str, Any]) -> str:
    versions = [f"{name} {version}" for name, version in record.get("versions", {}).items() if version]
    commit = f" (commit {record['git_commit']})" if record.get("git_commit") else ""
    return f"Trained with {', '.join(versions)}{commit}.\n" if versions else ""


def _figures(held_out: Mapping[str, Mapping[str, float]], images: int | None) -> str:
    if not held_out:
        return f"Held-out figures are {_UNKNOWN}: `theia test` makes them.\n"
    names = list(next(iter(held_out.values())))
    rows = [(teacher, *(f"{values[name]:.3f}" for name in names)) for teacher, values in held_out.items()]
    over = "" if images is None else f"On {images:,} images that training did not see:\n\n"
    return over + _table(rows, ("teacher", *(name.replace("_", " ") for name in names)))

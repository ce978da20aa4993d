"""SAM: the image encoder of Segment Anything, through the segment-anything package."""

import re
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theia.errors import ConfigError, WeightsError
from theia.teacher import RANDOM_SEED, Teacher, random_weights
from theia.types import Json, Masks, TeacherFeatures, TeacherSpec
from theia.utils.files import file_sha256

if TYPE_CHECKING:
    from segment_anything import SamPredictor
    from segment_anything.modeling import Sam

# Meta has no hub repository in this format. This one holds copies of Meta's files; the digests below are
# those of the originals, so nobody has to take the copies on trust.
HUB_ID = "ybelkada/segment-anything"
META_URL = "https://dl.fbaipublicfiles.com/segment_anything"
FILES = {"vit_b": "sam_vit_b_01ec64.pth", "vit_l": "sam_vit_l_0b3195.pth", "vit_h": "sam_vit_h_4b8939.pth"}
SHA256 = {
    "sam_vit_b_01ec64.pth": "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    "sam_vit_l_0b3195.pth": "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    "sam_vit_h_4b8939.pth": "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
}

MEAN = (123.675, 116.28, 103.53)  # ImageNet, in grey levels
STD = (58.395, 57.12, 57.375)
CHANNELS = 256
IMAGE_SIZE = 1024
PATCH_SIZE = 16
CORNER_SIZE = 224  # pixels of the long edge of an image in a corner of the canvas

Canvas = Literal["fill", "corner"]


def _preprocessing(image_size: int, canvas: Canvas = "fill") -> dict[str, Json]:
    in_corner: dict[str, Json] = {"canvas": image_size} if canvas == "corner" else {}
    return {
        "size": CORNER_SIZE if canvas == "corner" else image_size,
        **in_corner,
        "resize": "long edge",
        "interpolation": "bilinear",
        "antialias": True,
        "pad": "bottom and right, zeros after normalisation",
        "mean": list(MEAN),
        "std": list(STD),
    }


class SAM(Teacher):
    """Image embeddings of SAM: output of the encoder's neck, 256 channels on a grid of 64x64.

    Source: Kirillov et al., "Segment Anything", 2023.
    """

    spec = TeacherSpec(
        name="sam",
        channels=CHANNELS,
        grid_hw=(IMAGE_SIZE // PATCH_SIZE, IMAGE_SIZE // PATCH_SIZE),
        licence="Apache-2.0",
        weights=HUB_ID,
        revision=f"sha256:{SHA256[FILES['vit_h']]}",
        preprocessing=_preprocessing(IMAGE_SIZE),
    )

    def __init__(
        self,
        weights: str = HUB_ID,
        model: Literal["vit_b", "vit_l", "vit_h"] = "vit_h",
        architecture: dict[str, int] | None = None,
        mask_generator: dict[str, float] | None = None,
        canvas: Canvas = "fill",
    ) -> None:
        """Builds the model and loads its weights.

        Args:
            weights: A ``.pth`` checkpoint of the segment-anything package, a hub repository that holds Meta's
                file of ``model`` under ``checkpoints/``, or ``random``.
            model: Size of the encoder.
            architecture: Changes to the encoder: any of ``depth``, ``width``, ``heads`` and ``image_size`` (pixels).
            mask_generator: Settings of ``SamAutomaticMaskGenerator`` for ``theia decode``, such as ``points_per_side``
                and ``pred_iou_thresh``; by default the package's own.
            canvas: ``fill`` enlarges the image to the whole input, as SAM's authors do. ``corner`` puts it, 224 pixels
                on its long edge, into the upper left corner and keeps the 14x14 tokens there: a twentieth of the disk
                space. They are of a scene that is seen small, and have no masks in ``theia decode``.

        Raises:
            ConfigError: If ``architecture`` has an unknown key or sizes that do not fit, ``mask_generator`` has an
                unknown key, or the input is smaller than an image in its corner.
            WeightsError: If the checkpoint cannot be fetched or read, or is of another architecture.
        """
        super().__init__()
        self.mask_generator = _checked_settings(mask_generator or {})
        if weights == "random":
            with random_weights("sam"):
                sam = _build(model, architecture or {})
            changes = [f"{key} {value}" for key, value in sorted((architecture or {}).items())]
            revision = ", ".join([f"seed {RANDOM_SEED}", model, *changes])
        else:
            path = _checkpoint(weights, model)
            # Shapes only: what the checkpoint brings needs neither memory nor a first value.
            with torch.device("meta"):
                sam = _build(model, architecture or {})
            revision = _load(sam, path, model)
        # All of it: prompt encoder and mask decoder, which only decoding needs, are 16 MB.
        self.sam = sam
        self.image_size: int = sam.image_encoder.img_size
        self.canvas = canvas
        # Pixels of the long edge of the image in the input.
        self.edge = CORNER_SIZE if canvas == "corner" else self.image_size
        if self.edge > self.image_size:
            raise ConfigError(
                f"Teacher 'sam': an image of {self.edge} pixels does not fit into a corner of an input of "
                f"{self.image_size} pixels. Leave out canvas, or make the architecture's image_size larger."
            )
        grid = self.edge // PATCH_SIZE
        self.spec = replace(
            self.spec,
            weights=weights,
            revision=revision,
            grid_hw=(grid, grid),
            preprocessing=_preprocessing(self.image_size, canvas),
        )

    @property
    def image_encoder(self) -> nn.Module:
        """The part that gives the features."""
        encoder: nn.Module = self.sam.image_encoder
        return encoder

    def preprocess(self, images: Tensor) -> Tensor:
        """Resizes the long edge to ``edge``, normalises, pads to a square.

        Args:
            images: RGB images, uint8, shape ``(B, 3, H, W)``.

        Returns:
            Pixels, float32, shape ``(B, 3, image_size, image_size)``.
        """
        scale = self.edge / max(images.shape[-2:])
        height, width = (int(side * scale + 0.5) for side in images.shape[-2:])
        # Upstream resizes with Pillow: along the rows, then the columns, each time to whole grey levels, half up.
        pixels = images.float()
        for size in ((images.shape[-2], width), (height, width)):
            pixels = (F.interpolate(pixels, size, mode="bilinear", antialias=True) + 0.5).floor()
        pixels = (pixels - self.sam.pixel_mean) / self.sam.pixel_std
        return F.pad(pixels, (0, self.image_size - width, 0, self.image_size - height))

    def forward(self, images: Tensor) -> TeacherFeatures:
        """Features of a batch. See :meth:`theia.teacher.Teacher.forward`."""
        embeddings = self.image_encoder(self.preprocess(images))  # (B, C, H, W)
        rows, columns = self.spec.grid_hw
        embeddings = embeddings[..., :rows, :columns]
        return TeacherFeatures(embeddings.flatten(2).transpose(1, 2))

    def decode(self, patches: Tensor, images: Tensor) -> Masks | None:
        """Masks at points all over the image, as the package's automatic mask generator chooses them.

        ``None`` if the image lay in a corner: the mask decoder needs the features of the whole canvas. See
        :meth:`theia.teacher.Teacher.decode`.
        """
        if self.canvas == "corner":
            return None
        from segment_anything import SamAutomaticMaskGenerator

        generator = SamAutomaticMaskGenerator(self.sam, **self.mask_generator)
        embeddings = patches.transpose(1, 2).reshape(len(patches), CHANNELS, *self.spec.grid_hw)
        found = Masks([], [])
        for embedding, image in zip(embeddings, images.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
            # The generator asks its predictor to encode the image: here the features are there already.
            generator.predictor.set_image = partial(_feed, generator.predictor, embedding[None])
            records = generator.generate(image)
            masks = [torch.from_numpy(record["segmentation"]) for record in records]
            found.masks.append(torch.stack(masks) if masks else torch.zeros(0, *image.shape[:2], dtype=torch.bool))
            found.scores.append(torch.tensor([record["predicted_iou"] for record in records]))
        return found


def _feed(predictor: "SamPredictor", embedding: Tensor, image: Any) -> None:
    """Does what ``SamPredictor.set_image`` does, with features ``(1, 256, H, W)`` instead of an encoder."""
    predictor.reset_image()
    predictor.original_size = image.shape[:2]
    predictor.input_size = predictor.transform.get_preprocess_shape(*image.shape[:2], predictor.transform.target_length)
    predictor.features = embedding
    predictor.is_image_set = True


def _checked_settings(settings: dict[str, float]) -> dict[str, Any]:
    # Counts come as floats from a command line; upstream takes them for indices.
    whole = ["points_per_side", "points_per_batch"]
    known = [*whole, "pred_iou_thresh", "stability_score_thresh", "stability_score_offset", "box_nms_thresh"]
    # No crops: their features would have to be computed from the image.
    if unknown := sorted(settings.keys() - set(known)):
        raise ConfigError(f"Teacher 'sam': 'mask_generator' has no {', '.join(unknown)}. It takes {', '.join(known)}.")
    return {name: int(value) if name in whole else value for name, value in settings.items()}


def _build(model: str, architecture: dict[str, int]) -> "Sam":
    """The whole SAM of the registry, with an encoder of another size if asked for."""
    from segment_anything import sam_model_registry
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    if not architecture:
        return sam_model_registry[model]()
    with torch.device("meta"):
        sam = sam_model_registry[model]()
    size = {
        "depth": len(sam.image_encoder.blocks),
        "width": sam.image_encoder.pos_embed.shape[-1],
        "heads": sam.image_encoder.blocks[0].attn.num_heads,
        "image_size": sam.image_encoder.img_size,
    }
    unknown = sorted(architecture.keys() - size.keys())
    if unknown:
        raise ConfigError(f"Teacher 'sam': unknown architecture option {unknown}. Known: {', '.join(size)}.")
    size |= architecture
    if min(size.values()) < 1 or size["width"] % size["heads"] or size["image_size"] % PATCH_SIZE:
        raise ConfigError(
            f"Teacher 'sam': the architecture {size} is not possible. Make all sizes positive, the width a "
            f"multiple of the heads and the image size a multiple of {PATCH_SIZE} pixels."
        )
    # In all three models the last block of each quarter attends to the whole image, the others to windows.
    quarter = max(1, size["depth"] // 4)
    image_encoder = ImageEncoderViT(
        img_size=size["image_size"],
        patch_size=PATCH_SIZE,
        embed_dim=size["width"],
        depth=size["depth"],
        num_heads=size["heads"],
        mlp_ratio=4,
        out_chans=CHANNELS,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=tuple(range(quarter - 1, size["depth"], quarter)),
    )
    grid = size["image_size"] // PATCH_SIZE
    # Prompt encoder and mask decoder are the same in all three models.
    return Sam(
        image_encoder,
        PromptEncoder(
            embed_dim=CHANNELS,
            image_embedding_size=(grid, grid),
            input_image_size=(size["image_size"],) * 2,
            mask_in_chans=16,
        ),
        MaskDecoder(
            transformer_dim=CHANNELS,
            transformer=TwoWayTransformer(depth=2, embedding_dim=CHANNELS, mlp_dim=2048, num_heads=8),
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
        MEAN,
        STD,
    )


def _checkpoint(weights: str, model: str) -> Path:
    """The local file of ``weights``, fetched if it is a hub id."""
    import huggingface_hub

    path = Path(weights).expanduser()
    if path.is_file():
        return path
    file = FILES[model]
    local = f"Give the path of a checkpoint: --sam.weights /path/to/{file} (published at {META_URL}/{file})."
    if path.exists() or path.suffix in {".pth", ".pt"} or not re.fullmatch(r"[\w.-]+/[\w.-]+", weights):
        raise WeightsError(f"Teacher 'sam': no checkpoint file at {weights!r}. {local}")
    try:
        return Path(huggingface_hub.hf_hub_download(weights, f"checkpoints/{file}"))
    except Exception as error:
        # The hub client lets through whatever its HTTP library raises, and keeps the reason in the cause.
        cause = error.__cause__ or error
        raise WeightsError(
            f"Teacher 'sam': cannot fetch checkpoints/{file} of the hub repository {weights!r}: "
            f"{type(cause).__name__}: {cause}. {local}"
        ) from error


def _load(sam: "Sam", path: Path, model: str) -> str:
    """Loads a checkpoint of the whole SAM, strictly; returns its digest."""
    digest = file_sha256(path)
    if digest != SHA256.get(path.name, digest):
        raise WeightsError(
            f"Teacher 'sam': {path} has the name of Meta's checkpoint but differs from it (sha256 {digest}). "
            f"Fetch it again from {META_URL}/{path.name}, or rename it if it is your own."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged file makes the unpickler raise almost anything.
        raise WeightsError(
            f"Teacher 'sam': {path} cannot be read as a checkpoint: {textwrap.shorten(str(error), 200)} "
            "It is truncated, damaged, or of another kind: fetch it again."
        ) from error
    try:
        sam.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, TypeError) as error:
        raise WeightsError(
            f"Teacher 'sam': {path} does not fit the architecture {model!r}: "
            f"{textwrap.shorten(str(error), 300)} "
            "Choose the one it belongs to with --sam.model (vit_b, vit_l or vit_h)."
        ) from error
    # Assigned tensors keep the type of the file; the statistics of SAM's channels need float32.
    sam.float()
    # Checkpoints do not hold these.
    sam.pixel_mean, sam.pixel_std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return f"sha256:{digest}"

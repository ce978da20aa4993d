"""Layers for training on a CPU: the numbers of timm and torch, with less kept for the backward pass."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from theia.models import cpu_layers
from theia.models.cpu_layers import CpuAttention, CpuMlp, TransposedConvolution, adapt, attend, linear

HEADS, WIDTH = 3, 48


def fused(qkv: Tensor) -> Tensor:
    """Attention by torch, with the layout of :func:`attend`."""
    batch, tokens, _ = qkv.shape
    queries, keys, values = qkv.reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(queries, keys, values)
    return attended.transpose(1, 2).reshape(batch, tokens, -1)


def with_gradients(
    function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor, *parameters: Tensor
) -> list[Tensor]:
    x = x.clone().requires_grad_()
    result = function(x)
    return [result.detach(), *torch.autograd.grad(result, [x, *parameters], direction)]


def test_attention_has_the_values_and_gradients_of_torchs() -> None:
    torch.manual_seed(0)
    qkv, direction = torch.randn(2, 17, 3 * WIDTH).double(), torch.randn(2, 17, WIDTH).double()

    ours = with_gradients(lambda x: attend(x, HEADS), qkv, direction)

    torch.testing.assert_close(ours, with_gradients(fused, qkv, direction), rtol=1e-9, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 5, 3 * 6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    layer = nn.Linear(3, 5).double()

    assert torch.autograd.gradcheck(lambda part: attend(part, HEADS), qkv)
    for gelu in (False, True):
        assert torch.autograd.gradcheck(lambda x, *_, on=gelu: linear(x, layer, on), (x, *layer.parameters()))


@pytest.mark.parametrize("spread", [0.5, 1, 4, 8], ids=lambda spread: f"queries and keys times {spread}")
def test_attention_in_bfloat16_is_as_exact_as_torchs(spread: float) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 197, 3 * 3 * 64)
    qkv[..., : 2 * 3 * 64] *= spread**0.5
    qkv, direction = qkv.bfloat16(), torch.randn(2, 197, 3 * 64).bfloat16()
    exact = with_gradients(fused, qkv.double(), direction.double())

    def errors(attention: Callable[[Tensor], Tensor]) -> list[float]:
        results = with_gradients(attention, qkv, direction)
        pairs = zip(results, exact, strict=True)
        return [float((result - truth).norm() / truth.norm()) for result, truth in pairs]

    ours, torchs = errors(lambda x: attend(x, HEADS)), errors(fused)

    assert ours[0] == torchs[0]  # the forward pass is torch's
    assert ours[1] < max(2 * torchs[1], 2**-8)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("autocast", [True, False], ids=["bfloat16", "float32"])
def test_a_linear_layer_is_exactly_torchs(autocast: bool, gelu: bool, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias)
    x, direction = torch.randn(2, 9, 24), torch.randn(2, 9, 40)
    x, direction = (x.bfloat16(), direction.bfloat16()) if autocast else (x, direction)

    def of(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return with_gradients(function, x, direction, *layer.parameters())

    ours = of(lambda x: linear(x, layer, gelu))

    torch.testing.assert_close(ours, of(lambda x: layer(F.gelu(x) if gelu else x)), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"stride": 2, "padding": 1}, {"stride": 2, "output_padding": 1}, {}])
def test_a_transposed_convolution_is_torchs(options: dict[str, int]) -> None:
    torch.manual_seed(0)
    ours, torchs = (kind(4, 6, 3, **options).double() for kind in (TransposedConvolution, nn.ConvTranspose2d))
    torchs.load_state_dict(ours.state_dict())
    maps = torch.randn(2, 4, 5, 7).double()
    direction = torch.randn_like(torchs(maps))

    results = [with_gradients(layer, maps, direction, *layer.parameters()) for layer in (ours, torchs)]

    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def blocks() -> tuple[Block, Block]:
    """A block of timm, and the same one adapted."""
    torch.manual_seed(0)
    theirs = Block(WIDTH, HEADS, qkv_bias=True)
    ours = copy.deepcopy(theirs)
    adapt(ours)
    return ours, theirs


def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each use of the functions of this file from here on."""
    seen: list[str] = []
    for name in ("linear", "attend"):
        original = getattr(cpu_layers, name)
        monkeypatch.setattr(
            cpu_layers,
            name,
            lambda *args, name=name, original=original, **more: (seen.append(name), original(*args, **more))[1],
        )
    return seen


@pytest.mark.parametrize("autocast", [True, False], ids=["bfloat16", "float32"])
def test_a_block_trains_as_timms_does(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = blocks()
    x, direction = torch.randn(2, 17, WIDTH), torch.randn(2, 17, WIDTH)
    seen = taken(monkeypatch)

    def of(block: Block) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return with_gradients(block, x, direction, *block.parameters())

    results, expected = of(ours), of(theirs)

    assert seen == ["linear", *["attend"] * autocast, "linear", "linear", "linear"]
    torch.testing.assert_close(results[0], expected[0], rtol=0, atol=0)
    for result, truth in zip(results[1:], expected[1:], strict=True):
        assert (result - truth).norm() <= (1e-2 if autocast else 1e-6) * truth.norm()


@pytest.mark.parametrize("bias", [True, False])
def test_patches_in_bfloat16_are_those_of_a_convolution(bias: bool) -> None:
    torch.manual_seed(0)
    theirs = PatchEmbed(img_size=(24, 16), patch_size=8, embed_dim=12, bias=bias).train()
    ours = copy.deepcopy(theirs)
    adapt(ours)
    assert type(ours.proj) is cpu_layers.CpuPatches
    images, direction = torch.randn(2, 3, 24, 16), torch.randn(2, 6, 12)
    with torch.autocast("cpu", torch.bfloat16):
        low = ours(images)
    exact = theirs(images)
    for tokens in (low, exact):
        tokens.backward(direction)

    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), exact, rtol=0.02, atol=0.02)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0.02, atol=0.05)
    assert torch.equal(ours(images), exact)  # in float32, it is the convolution itself


def test_a_stem_of_another_kind_keeps_its_convolution() -> None:
    stem = PatchEmbed(img_size=16, patch_size=8, embed_dim=12)
    stem.proj = nn.Conv2d(3, 12, 8, 8, padding=1)
    adapt(stem)
    assert type(stem.proj) is nn.Conv2d


def test_less_is_kept_than_by_timm() -> None:
    def kept(block: Block) -> int:
        storages: dict[int, int] = {}
        alive = []

        def note(tensor: Tensor) -> Tensor:
            alive.append(tensor)
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            block(torch.randn(8, 197, WIDTH, requires_grad=True))
        own = {parameter.data_ptr() for parameter in block.parameters()}
        return sum(size for pointer, size in storages.items() if pointer not in own)

    ours, theirs = blocks()
    activated = 8 * 197 * 4 * WIDTH * 2  # bytes of the GELU's result in bfloat16
    weights = 12 * WIDTH**2 * 2  # bytes of the four matrices in bfloat16

    assert kept(theirs) - kept(ours) == activated + weights


def test_parameters_keep_their_names_and_a_copy_its_kind() -> None:
    ours, theirs = blocks()

    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert (type(again.attn), type(again.mlp)) == (CpuAttention, CpuMlp)


def replace(of_attention: dict[str, nn.Module], of_mlp: dict[str, nn.Module]) -> Callable[[Block], None]:
    def change(block: Block) -> None:
        for module, layers in ((block.attn, of_attention), (block.mlp, of_mlp)):
            for name, layer in layers.items():
                setattr(module, name, copy.deepcopy(layer))

    return change


class Adapted(nn.Linear):
    """A linear layer of another kind, as tools for fine-tuning put in."""

    def __init__(self, times: int = 1) -> None:
        super().__init__(WIDTH, times * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.eval(),
        replace({"attn_drop": nn.Dropout(1e-9)}, {"drop1": nn.Dropout(1e-9)}),
        replace({"q_norm": nn.LayerNorm(WIDTH // HEADS)}, {"norm": nn.LayerNorm(4 * WIDTH)}),
        replace({"proj": Adapted()}, {"fc1": Adapted(4)}),
        replace({"qkv": Adapted(3)}, {"act": nn.GELU("tanh")}),
    ],
    ids=["not training", "dropout", "norms", "adapted layers", "another activation"],
)
def test_anything_else_is_left_to_timm(change: Callable[[Block], object], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = blocks()
    for block in (ours, theirs):
        change(block)
    seen = taken(monkeypatch)
    x = torch.randn(2, 17, WIDTH)

    results = [block(x) for block in (ours, theirs)]

    assert seen == []
    torch.testing.assert_close(results[0], results[1])


def test_masks_are_left_to_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = blocks()
    mask = torch.zeros(17, 17).index_fill_(1, torch.arange(9), -torch.inf)
    seen = taken(monkeypatch)
    x = torch.randn(2, 17, WIDTH)

    result = ours.attn(x, attn_mask=mask)

    assert seen == []
    torch.testing.assert_close(result, theirs.attn(x, attn_mask=mask))


def test_transforms_compilers_and_other_devices_are_left_to_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = blocks()
    seen = taken(monkeypatch)
    x = torch.randn(2, 17, WIDTH)

    def loss(block: Block) -> Callable[[Tensor], Tensor]:
        return lambda image: block(image[None]).square().sum()

    per_image = [torch.func.vmap(torch.func.grad(loss(block)))(x) for block in (ours, theirs)]
    torch.testing.assert_close(per_image[0], per_image[1])
    torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="eager")(x), theirs(x))
    assert ours.to("meta")(x.to("meta")).shape == x.shape
    assert seen == []


def test_other_layers_stay() -> None:
    class Other(Attention):
        pass

    model = nn.Sequential(Other(WIDTH, HEADS), Attention(WIDTH, HEADS), Mlp(WIDTH))

    adapt(model)

    assert [type(layer) for layer in model] == [Other, CpuAttention, CpuMlp]

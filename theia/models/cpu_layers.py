"""Layers that train faster, or in less memory, on a CPU than those of timm and torch, with the same results.

Attention: in bfloat16, the backward pass of torch's fused attention takes twice as long as plain products.
Linear layers: they keep their input alone; the backward pass casts weights and applies the activation once more.
Patch embedding: in bfloat16, a product of the patches is 1.4 to 1.8 times as fast as the convolution.
Transposed convolutions: in bfloat16, torch may take five times as long for the bias as for all the rest.

Parameters and their names are those of timm and torch, and so is the code that runs on a GPU, under transforms of
torch.func, and in a model that is compiled, exported or not training. The bias of a transposed convolution is apart
whenever it is on a CPU.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_MIDDLE = 3.0  # between 0 and -6, the logarithms of the attention weights that matter


def adapt(model: nn.Module) -> None:
    """Gives a timm model the attention, the MLP and the patch embedding of this file, in place.

    Args:
        model: The model; layers of other kinds, and its parameters, stay as they are.
    """
    for module in model.modules():
        if type(module) is Attention:
            module.__class__ = CpuAttention
        elif type(module) is Mlp:
            module.__class__ = CpuMlp
        elif type(module) is PatchEmbed and _cuts_patches(module.proj):
            module.proj.__class__ = CpuPatches


class CpuAttention(Attention):
    """timm's attention of tokens to all tokens of their image."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attends; arguments and result are those of timm."""
        if is_causal:  # not known to every version of timm
            return super().forward(x, attn_mask, is_causal)
        if attn_mask is not None or not _trains_here(self, x, (self.qkv, self.proj)):
            return super().forward(x, attn_mask)
        qkv = linear(x, self.qkv)
        if qkv.dtype == torch.bfloat16:
            return linear(attend(qkv, self.num_heads), self.proj)
        queries, keys, values = _split(qkv, self.num_heads)
        return linear(_join(F.scaled_dot_product_attention(queries, keys, values)), self.proj)


class CpuMlp(Mlp):
    """timm's MLP: linear, GELU, linear."""

    def forward(self, x: Tensor) -> Tensor:
        """Applies the MLP to tokens ``(B, N, C)``."""
        is_gelu = type(self.act) is nn.GELU and self.act.approximate == "none"
        if not is_gelu or not _trains_here(self, x, (self.fc1, self.fc2), but=self.act):
            return super().forward(x)  # type: ignore[no-any-return, no-untyped-call]
        return linear(linear(x, self.fc1), self.fc2, gelu=True)  # type: ignore[arg-type]


class CpuPatches(nn.Conv2d):
    """A convolution of patches that neither overlap nor leave gaps, as a product of the patches and the weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolves pixels ``(B, 3, H, W)``, whose sides are multiples of the patch."""
        low = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        if not (low and _trains_here(self, input, ())):
            return super().forward(input)
        (down, across), (height, width) = self.kernel_size, input.shape[-2:]
        rows, columns = height // down, width // across
        patches = input.reshape(len(input), -1, rows, down, columns, across).permute(0, 2, 4, 1, 3, 5)
        tokens = F.linear(patches.reshape(len(input), rows, columns, -1), self.weight.flatten(1), self.bias)
        return tokens.permute(0, 3, 1, 2)


class TransposedConvolution(nn.ConvTranspose2d):
    """A transposed convolution that on a CPU adds its bias by itself, forwards and backwards."""

    def forward(self, maps: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolves maps ``(B, C, H, W)``."""
        if maps.device.type != "cpu" or self.bias is None or output_size is not None:
            return super().forward(maps, output_size)
        padding = cast(tuple[int, ...], self.padding)  # a transposed convolution takes no word for it
        sums = F.conv_transpose2d(
            maps, self.weight, None, self.stride, padding, self.output_padding, self.groups, self.dilation
        )
        return sums + self.bias.to(sums.dtype).view(-1, 1, 1)


def linear(x: Tensor, layer: nn.Linear, gelu: bool = False) -> Tensor:
    """A linear layer that keeps its input alone for the backward pass, in the precision of autocast.

    Args:
        x: Input, shape ``(..., C)``.
        layer: The layer.
        gelu: Whether the layer is applied to the exact GELU of the input.
    """
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    result: Tensor = _Linear.apply(x, layer.weight, layer.bias, gelu)
    return result


def attend(qkv: Tensor, heads: int) -> Tensor:
    """Scaled dot-product attention by torch, with a backward pass in plain products.

    It computes the attention weights once more, from what torch's keeps too.

    Args:
        qkv: Queries, keys and values side by side, and in each of them the heads, shape ``(B, N, 3 * C)``.
        heads: Number of heads.

    Returns:
        The attended values, heads side by side, shape ``(B, N, C)``.
    """
    result: Tensor = _Attend.apply(qkv, heads)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gelu = gelu
        with torch.autocast("cpu", enabled=False):
            shift = None if bias is None else bias.to(x.dtype)
            return F.linear(F.gelu(x) if gelu else x, weight.to(x.dtype), shift)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        rows = gradient.flatten(0, -2)
        with torch.autocast("cpu", enabled=False):
            if ctx.needs_input_grad[0]:
                of_x = gradient @ weight.to(x.dtype)
                of_x = torch.ops.aten.gelu_backward(of_x, x) if ctx.gelu else of_x
            if ctx.needs_input_grad[1]:
                activated = F.gelu(x) if ctx.gelu else x
                of_weight = (rows.t() @ activated.flatten(0, -2)).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                of_bias = rows.sum(0).to(weight.dtype)
        return of_x, of_weight, of_bias, None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        # What F.scaled_dot_product_attention calls on a CPU; it does not give the logarithms.
        attended, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_split(qkv, heads))
        ctx.save_for_backward(qkv, log_sums)
        ctx.heads = heads
        return _join(attended)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        qkv, log_sums = ctx.saved_tensors  # (B, N, 3 * C), (B, heads, N)
        with torch.autocast("cpu", enabled=False):
            parts = _split(qkv, ctx.heads).contiguous()  # (3, B, heads, N, D)
            scale = parts.shape[-1] ** -0.5
            parts[0].mul_(scale)
            gradients = torch.empty_like(parts)
            queries, keys, values = parts.flatten(1, 2)
            of_queries, of_keys, of_values = gradients.flatten(1, 2)
            of_attended = _split(gradient, ctx.heads, parts=1).flatten(0, 2)
            # Logarithms of the weights, up to a number for each query that the softmax takes out. For weights from 1
            # down to exp(-6) they are below 3, where bfloat16 is finer than for the products themselves.
            shift = (_MIDDLE - log_sums).flatten(0, 1).unsqueeze(-1).to(qkv.dtype)
            products = torch.baddbmm(shift, queries, keys.mT)  # (B * heads, N, N)
            weights = products.softmax(-1)
            torch.bmm(weights.mT, of_attended, out=of_values)
            # In the place of the products, which the cache still holds.
            of_weights = torch.bmm(of_attended, values.mT, out=products)
            of_products = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            torch.bmm(of_products, keys, out=of_queries)
            torch.bmm(of_products.mT, queries, out=of_keys)
            gradients[0].mul_(scale)
        return gradients.permute(1, 3, 0, 2, 4).flatten(2), None


def _cuts_patches(layer: nn.Module) -> bool:
    if type(layer) is not nn.Conv2d:
        return False
    plain = layer.padding == (0, 0) and layer.dilation == (1, 1) and layer.groups == 1
    return plain and layer.stride == layer.kernel_size


def _split(side_by_side: Tensor, heads: int, parts: int = 3) -> Tensor:
    """Takes parts and heads apart: a view ``(parts, B, heads, N, D)`` of ``(B, N, parts * heads * D)``."""
    batch, tokens, width = side_by_side.shape
    return side_by_side.view(batch, tokens, parts, heads, width // (parts * heads)).permute(2, 0, 3, 1, 4)


def _join(heads: Tensor) -> Tensor:
    """Puts heads ``(B, heads, N, D)`` side by side, ``(B, N, heads * D)``."""
    return heads.transpose(1, 2).flatten(2)


def _trains_here(module: nn.Module, x: Tensor, layers: tuple[nn.Module, ...], but: nn.Module | None = None) -> bool:
    """Whether a module trains on a CPU right now, with linear layers and nothing else that does something."""
    if x.device.type != "cpu" or not module.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():  # they would need rules of their own
        return False
    others = [child for child in module.children() if child not in layers and child is not but]
    idle = all(isinstance(child, nn.Identity) or (type(child) is nn.Dropout and child.p == 0) for child in others)
    return idle and all(type(layer) is nn.Linear for layer in layers)

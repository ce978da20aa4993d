"""Images under everything that torch does with a function: transforms, tracing, compilation, gradients."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from encoder.small import small
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from theia.encoder.encoder import Encoder
from theia.errors import ImageError, ShapeError


def photos(count: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # torch's own: attention is not batched by vmap, but gone through; tracing is deprecated.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        warnings.filterwarnings("ignore", message=".*torch.jit.* is (deprecated|not supported)")
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        yield


def test_vmap_gives_what_a_batch_gives(encoder: Encoder) -> None:
    expected = encoder(photos(), pool="mean")
    torch.testing.assert_close(vmap(lambda image: encoder(image[None], pool="mean")[0])(photos()), expected)
    raw = encoder.translate(photos(2, 224, 224), "odd", denormalize=True)["odd"]
    mapped = vmap(lambda image: encoder.translate(image[None], "odd", denormalize=True)["odd"][0])
    torch.testing.assert_close(mapped(photos(2, 224, 224)), raw)


def test_gradients_reach_the_image_and_are_those_of_finite_differences(encoder: Encoder) -> None:
    encoder.double()
    image = photos(1, 16, 16).double().mul(0.8).add(0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda given: encoder(given, pool="mean"), image)
    expected = torch.autograd.functional.jacobian(lambda given: encoder(given, pool="mean")[0], image)
    torch.testing.assert_close(jacrev(lambda given: encoder(given, pool="mean")[0])(image), expected)


def test_gradients_of_each_sample(encoder: Encoder) -> None:
    parameters = dict(encoder.named_parameters())

    def loss(given: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(encoder, given, (image[None],), {"pool": "mean"}).square().sum()

    gradients = vmap(grad(loss), in_dims=(None, 0))(parameters, photos())
    positions = encoder.distiller.student.backbone.model.pos_embed
    for image, given in zip(photos(), gradients["distiller.student.backbone.model.pos_embed"], strict=True):
        encoder.zero_grad()
        loss(parameters, image).backward()
        torch.testing.assert_close(given, positions.grad, atol=1e-4, rtol=1e-4)


def as_fx(function: Callable[[Tensor], Tensor], mode: str) -> Callable[[Tensor], Tensor]:
    return make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True)(photos())


@pytest.mark.parametrize(
    "record",
    [
        lambda function: as_fx(function, "real"),
        lambda function: as_fx(function, "fake"),
        lambda function: as_fx(function, "symbolic"),
        lambda function: torch.jit.trace(function, photos(), check_trace=False),
    ],
    ids=["make_fx", "make_fx fake", "make_fx symbolic", "jit.trace"],
)
def test_what_is_recorded_once_gives_the_same_for_other_images(encoder: Encoder, record: Any) -> None:
    encoder.freeze()
    other = 1 - photos()
    recorded = record(lambda given: encoder(given, pool="mean"))
    torch.testing.assert_close(recorded(other), encoder(other, pool="mean"))


def test_an_exported_program_gives_the_same(encoder: Encoder) -> None:
    count = torch.export.Dim("count", min=1, max=8)
    program = torch.export.export(encoder.freeze(), (photos(),), dynamic_shapes={"images": {0: count}})
    torch.testing.assert_close(program.module()(photos(5)), encoder(photos(5)))


def test_one_compiled_graph_takes_images_of_any_size() -> None:
    encoder = Encoder(small(depth=1))
    torch.compiler.reset()
    compiled = torch.compile(encoder, backend="eager", fullgraph=True, dynamic=True)
    for batch in (photos(), photos(3, 32, 48)):
        torch.testing.assert_close(compiled(batch), encoder(batch))


def test_fake_and_meta_tensors_give_shapes(encoder: Encoder) -> None:
    loaded = Encoder(small())
    loaded.load_state_dict(encoder.state_dict())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert encoder(mode.from_tensor(photos())).shape == (2, 4, 32)
        raw = loaded.translate(mode.from_tensor(photos(2, 224, 224)), "odd", denormalize=True)
    assert raw["odd"].shape == (2, 21, 5)
    assert encoder.to("meta")(photos()).shape == (2, 4, 32)


@pytest.mark.gpu
@torch.no_grad()
def test_a_cuda_graph_can_be_captured_with_float_images(encoder: Encoder) -> None:
    encoder.to("cuda")
    images = photos(2, 224, 224).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        encoder(images)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        features = encoder(images)
    images.copy_(1 - images)
    graph.replay()
    torch.testing.assert_close(features, encoder(images))


@pytest.mark.parametrize("subclass", [torch.nn.Parameter, lambda batch: batch.clone().requires_grad_()])
def test_a_plain_call_is_checked_whatever_holds_the_images(encoder: Encoder, subclass: Any) -> None:
    assert encoder(subclass(photos())).requires_grad
    with pytest.raises(ImageError, match="divide by 255"):
        encoder(subclass(photos() * 255))


@torch.no_grad()
def test_memory_orders_make_no_difference(encoder: Encoder) -> None:
    pixels = photos().mul(255).byte()
    expected = encoder(pixels)
    wide = torch.zeros(2, 3, 32, 64, dtype=torch.uint8)
    wide[..., ::2] = pixels
    channels_last = pixels.permute(0, 2, 3, 1).contiguous()
    for given in (
        pixels.contiguous(memory_format=torch.channels_last),
        wide[..., ::2],
        np.asfortranarray(pixels),
        channels_last.flip(3).numpy()[..., ::-1],
    ):
        torch.testing.assert_close(encoder(given), expected)
    assert encoder.to(memory_format=torch.channels_last)(pixels).shape == expected.shape


def test_no_images_give_no_features(encoder: Encoder) -> None:
    for empty in (photos(0), photos(0).byte()):
        assert encoder(empty).shape == (0, 4, 32)
        for pool in ("mean", "max", "cls"):
            assert encoder(empty, pool=pool).shape == (0, 32)
    assert encoder.translate(photos(0, 224, 224))["odd"].shape == (0, 21, 5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bool, torch.uint16, torch.complex64])
def test_numbers_that_are_no_pixels_are_refused(encoder: Encoder, dtype: torch.dtype) -> None:
    with pytest.raises(ImageError, match=f"type {dtype}.* bits"):
        encoder(photos().to(dtype))


def test_pictures_in_a_list_are_refused_with_what_makes_a_batch_of_them(encoder: Encoder) -> None:
    pictures = [np.zeros((32, 32, 3), np.uint8)] * 2
    with pytest.raises(ShapeError, match=r"type list.*numpy\.stack\(\[numpy\.asarray\(picture\) for"):
        encoder(pictures)
    assert encoder(np.stack([np.asarray(picture) for picture in pictures])).shape == (2, 4, 32)

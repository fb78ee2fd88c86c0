"""What patches have in common, against scikit-learn, NumPy and planted foregrounds."""

import numpy as np
import pytest
import torch
from einops import rearrange

import sslvit
from sslvit.evaluate import seen
from sslvit.evaluate.seen import image_map, inner_patches, nearest_patches, pca_of_patches, principal


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Features whose directions differ in their spread, so that their order is certain."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values * torch.linspace(3, 0.5, shape[-1], dtype=torch.float64) + 1


def sklearn_pca(rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Components whose largest weight is positive, and their shares of the variance."""
    decomposition = pytest.importorskip("sklearn.decomposition")
    made = decomposition.PCA(count, svd_solver="full").fit(rows)
    signs = [np.sign(row[abs(row).argmax()]) for row in made.components_]
    return made.components_ * np.array(signs)[:, None], made.explained_variance_ratio_


@pytest.mark.parametrize("shape", [(200, 12), (8, 40), (12, 12)])
def test_principal_components_are_scikit_learns(shape):
    rows = drawn(*shape)
    basis, (components, shares) = principal(rows, 5), sklearn_pca(rows.numpy(), 5)
    np.testing.assert_allclose(basis.directions, components, atol=1e-9)
    np.testing.assert_allclose(basis.variance, shares, rtol=1e-9)
    np.testing.assert_allclose(seen.projected(rows, basis), (rows.numpy() - rows.numpy().mean(0)) @ components.T)


def test_there_are_no_more_components_than_rows_and_columns_allow():
    assert principal(drawn(3, 9), 5).directions.shape == (2, 9)
    assert principal(drawn(9, 3), 5).directions.shape == (3, 3)
    assert principal(drawn(1, 4), 5).directions.shape == (0, 4)


def expected_colors(rows: np.ndarray) -> np.ndarray:
    components, _ = sklearn_pca(rows, 3)
    values = (rows - rows.mean(0)) @ components.T
    low, high = np.percentile(values, [2, 98], axis=0)
    return ((values - low) / (high - low)).clip(0, 1)


def test_patches_get_the_colors_of_all_and_the_foreground_those_of_its_own():
    features = drawn(5, 20, 8)
    actual, rows = pca_of_patches(features, (4, 5)), features.numpy().reshape(-1, 8)
    (first, *_), shares = sklearn_pca(rows, 3)
    values = ((rows - rows.mean(0)) @ first).reshape(5, 20)
    inner = inner_patches((4, 5)).numpy()
    assert inner.reshape(4, 5).astype(int).tolist() == [[0] * 5, [0, 1, 1, 1, 0], [0, 1, 1, 1, 0], [0] * 5]
    lean = [(side[:, inner].mean() - side[:, ~inner].mean()) for side in (values > 0, values < 0)]
    values = values if lean[0] >= lean[1] else -values
    np.testing.assert_allclose(actual.first, values, rtol=1e-5, atol=1e-6)
    assert (actual.foreground.numpy() == (values > 0)).all()
    np.testing.assert_allclose(actual.variance, shares)
    np.testing.assert_allclose(actual.colors, expected_colors(rows).reshape(5, 20, 3), atol=1e-6)
    chosen = features.numpy()[values > 0]
    np.testing.assert_allclose(actual.foreground_colors[actual.foreground], expected_colors(chosen), atol=1e-6)
    assert not actual.foreground_colors[~actual.foreground].any()


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("size", [2, 4])  # of an object in the middle of 6 x 6 patches: less than half of them
def test_the_foreground_is_what_lies_inside_whatever_its_sign(sign, size):
    there = torch.zeros(6, 6, dtype=torch.bool)
    edge = (6 - size) // 2
    there[edge : 6 - edge, edge : 6 - edge] = True
    features = drawn(3, 36, 8, seed=1) * 0.1
    features[..., 2] += sign * 10 * rearrange(there, "h w -> (h w)")
    assert (pca_of_patches(features, (6, 6)).foreground == there.flatten()).all()


def test_without_inner_patches_the_sign_stays():
    features = drawn(40, 4, 6)
    components, _ = sklearn_pca(features.numpy().reshape(-1, 6), 1)
    values = (features.numpy() - features.numpy().mean((0, 1))) @ components[0]
    assert (pca_of_patches(features, (2, 2)).foreground.numpy() == (values > 0)).all()


def test_few_patches_and_few_directions_have_colors_too():
    single = pca_of_patches(drawn(1, 1, 4), (1, 1))
    assert single.colors.tolist() == [[[0.5, 0.5, 0.5]]]
    two = pca_of_patches(drawn(2, 4, 2), (2, 2))
    assert (two.colors[..., 2] == 0.5).all()
    assert two.colors[..., 0].unique().numel() > 2
    alike = pca_of_patches(torch.ones(2, 4, 3), (2, 2))
    assert not alike.foreground.any()


def test_nearest_patches_are_numpys_one_per_other_image():
    features = drawn(9, 6, 5)
    x = features.numpy()
    cosines = (x @ x[4, 2]) / np.linalg.norm(x, axis=-1) / np.linalg.norm(x[4, 2])
    order = [i for i in np.argsort(-cosines.max(1)) if i != 4][:5]
    actual = nearest_patches(features, image=4, patch=2, count=5)
    assert actual.images.tolist() == order
    assert actual.patches.tolist() == cosines.argmax(1)[order].tolist()
    np.testing.assert_allclose(actual.cosines, cosines.max(1)[order], rtol=1e-12)
    assert len(nearest_patches(features, 4, 2, count=100).images) == 8


def test_a_map_without_scikit_learn_shows_two_components(monkeypatch):
    features = drawn(30, 6)
    components, shares = sklearn_pca(features.numpy(), 2)
    monkeypatch.setattr(seen, "find_spec", lambda name: None)
    actual = image_map(features)
    np.testing.assert_allclose(
        actual.points, (features.numpy() - features.numpy().mean(0)) @ components.T, rtol=1e-5, atol=1e-5
    )
    assert actual.method == f"two principal components, {shares.sum():.0%} of the variance"
    assert image_map(drawn(1, 6)).points.tolist() == [[0, 0]]
    assert image_map(drawn(2, 1)).points[:, 1].tolist() == [0, 0]


def test_a_map_with_scikit_learn_keeps_groups_together_and_is_the_same_again():
    pytest.importorskip("sklearn")
    groups = torch.arange(40) % 2
    features = drawn(40, 6) + 30 * groups.unsqueeze(1)
    first, again = image_map(features), image_map(features)
    assert torch.equal(first.points, again.points)
    assert first.method.startswith("t-SNE by scikit-learn")
    distances = torch.cdist(first.points, first.points).fill_diagonal_(torch.inf)
    assert (groups[distances.argmin(1)] == groups).all()
    assert "principal" in image_map(drawn(5, 6)).method
    collapsed = image_map(torch.ones(20, 6))
    assert "principal" in collapsed.method
    assert not collapsed.points.any()


def test_what_is_not_features_is_refused_in_a_sentence():
    for call, words in (
        (lambda: pca_of_patches(drawn(2, 6, 4), (2, 4)), "6 patches per image, which are no grid of 2 rows by 4"),
        (lambda: pca_of_patches(drawn(6, 4), (2, 2)), r"shape \(6, 4\) are not those of patches n p d"),
        (lambda: image_map(drawn(6, 4) / 0), "24 of the features are not finite"),
        (lambda: nearest_patches(drawn(2, 6, 4), 2, 0, 3), "patch 0 of image 2: there are 2 images of 6 patches"),
        (lambda: sslvit.pca_of_patches(drawn(2, 6, 4)), r"6 patches per image are no square: give grid=\(rows"),
        (lambda: sslvit.pca_of_patches(drawn(2, 6)), "extract those of all patches by readout='patches'"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_from_python_they_take_extracted_features():
    vit = sslvit.ViT.variant("mu/8", image_size=(16, 24))
    features = sslvit.extract_features(vit, "shapes:n=9", readout=("cls", "patches"))
    patches = features.by_readout["patches"]
    for name, value in sslvit.pca_of_patches(features, vit.grid)._asdict().items():
        assert torch.equal(value, getattr(pca_of_patches(patches, (2, 3)), name)), name
    assert (
        sslvit.nearest_patches(features, 1, 5, count=2).images.tolist() == nearest_patches(patches, 1, 5, 2)[0].tolist()
    )
    with pytest.raises(ValueError, match="features are cls: extract those of all patches"):
        sslvit.nearest_patches(sslvit.extract_features(vit, "shapes:n=9", readout="cls"), 1, 5)

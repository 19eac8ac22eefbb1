"""Many logistic regressions at once are scikit-learn's."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from vpt.methods._regressions import regressions


def problems(images, classes, dim, count=3):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % classes
    centres = torch.randn(classes, dim, generator=generator)
    features = 2 * torch.randn(images, dim, generator=generator) + centres[labels]
    features = features * torch.rand(dim, generator=generator) + 1
    used = torch.rand(count, images, generator=generator) > 0.25
    return features, labels, used


@pytest.mark.parametrize(("images", "classes", "dim"), [(20, 3, 32), (40, 2, 24), (60, 4, 8)])
@pytest.mark.parametrize("penalty", [1e-4, 0.03, 10.0])
def test_the_same_regressions_as_scikit_learn(images, classes, dim, penalty):
    features, labels, used = problems(images, classes, dim)
    many = features.expand(3, -1, -1), labels.expand(3, -1), used, classes, penalty
    weights, biases = regressions(*many)
    again = regressions(*many, start=(torch.randn_like(weights), torch.randn_like(biases)))
    everything = features.double()
    for own, weight, bias, *other in zip(used, weights, biases, *again, strict=True):
        scaler = StandardScaler().fit(everything[own])
        fitted = LogisticRegression(C=penalty, tol=1e-10, max_iter=10_000).fit(
            scaler.transform(everything[own]), labels[own]
        )
        expected = torch.from_numpy(fitted.predict_proba(scaler.transform(everything)))
        for found in ((weight, bias), other):
            actual = (everything @ found[0].T + found[1]).softmax(1)
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_a_class_without_images_is_never_predicted():
    features, labels, used = problems(30, 3, 8)
    used = used & (labels != 1)
    weights, biases = regressions(features.expand(3, -1, -1), labels.expand(3, -1), used, 3, 1.0)
    assert biases[:, 1].tolist() == [-torch.inf] * 3
    alone = regressions(features.expand(3, -1, -1), (labels > 1).long().expand(3, -1), used, 2, 1.0)
    both = features.double() @ (weights[0, 2] - weights[0, 0]) + biases[0, 2] - biases[0, 0]
    binary = features.double() @ (alone[0][0, 1] - alone[0][0, 0]) + alone[1][0, 1] - alone[1][0, 0]
    torch.testing.assert_close(both, binary, rtol=0, atol=1e-5)


def test_a_class_that_the_start_lacks_is_learned():
    features, labels, used = problems(30, 3, 8)
    many = features.expand(3, -1, -1), labels.expand(3, -1)
    lacking = regressions(*many, used & (labels != 1), 3, 1.0)
    found, expected = (regressions(*many, used, 3, 1.0, start) for start in (lacking, None))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)

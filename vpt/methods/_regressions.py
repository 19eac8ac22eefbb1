"""Many small logistic regressions at once: Newton's method, its steps by conjugate gradients."""

import torch
from torch import Tensor

ITERATIONS = 30  # of Newton, and of the conjugate gradients of each
PRECISE = 1e-6  # gradient of the mean loss at which a regression is done


def regressions(
    features: Tensor,
    labels: Tensor,
    used: Tensor,
    num_classes: int,
    penalty: Tensor | float,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights (R, C, dim) and biases (R, C) of R multinomial logistic regressions.

    Each is scikit-learn's `LogisticRegression` on features that are standardised over the images
    which it uses; the scaling is in the weights. A class without images has weights of 0 and a
    bias of -inf. Computed in float64.

    Args:
        features: (R, N, dim).
        labels: class numbers (R, N).
        used: (R, N), True where a regression uses an image.
        num_classes: C.
        penalty: scikit-learn's C, one or (R,).
        start: weights and biases to begin at, which changes the way but not the end.
    """
    weight, count = used.double()[..., None], used.sum(1).double()[:, None, None]
    features = features.double()
    mean = (weight * features).sum(1, keepdim=True) / count
    spread = ((weight * (features - mean) ** 2).sum(1, keepdim=True) / count).sqrt()
    spread = torch.where(spread > 1e-12, spread, 1.0)
    inputs = weight * (features - mean) / spread
    truth = torch.nn.functional.one_hot(labels, num_classes).double() * weight
    present = truth.any(1, keepdim=True)
    hidden = torch.zeros_like(truth[:, :1]).masked_fill(~present, -torch.inf)
    strength = torch.as_tensor(penalty, dtype=torch.float64).expand(len(features))[:, None, None]
    # of two classes scikit-learn penalises the log-odds, whose square is twice that of both rows
    strength = torch.where(present.sum(2, keepdim=True) == 2, strength / 2, strength)
    few = inputs.shape[1] < inputs.shape[2]
    basis = _root(inputs) if few else inputs
    ones = weight
    problem = _Problem(torch.cat([basis, ones], 2), truth, weight, hidden, strength)
    where = basis.new_zeros(len(basis), basis.shape[2] + 1, num_classes)
    if start is not None:
        scaled = start[0].double() * spread
        centre = start[1].double() + (start[0].double() @ mean.mT)[..., 0]
        centre = torch.where(present[:, 0] & centre.isfinite(), centre, 0.0)
        centre = centre - centre.sum(1, keepdim=True) / present[:, 0].sum(1, keepdim=True)
        slopes = scaled.mT
        if few:
            slopes = torch.linalg.solve_triangular(basis, inputs @ slopes, upper=False)
        where = torch.cat([slopes, centre[:, None]], 1) * present
    where = problem.solve(where)
    slopes = where[:, :-1]
    if few:
        slopes = inputs.mT @ torch.linalg.solve_triangular(basis.mT, slopes, upper=True)
    weights = (slopes / spread.mT).mT
    biases = where[:, -1] - (weights @ mean.mT)[..., 0]
    return weights, torch.where(present[:, 0], biases, -torch.inf)


def _root(inputs: Tensor) -> Tensor:
    """Lower triangular (R, N, N) with the inner products of inputs (R, N, dim)."""
    products = inputs @ inputs.mT
    scale = products.diagonal(dim1=1, dim2=2).mean(1)
    jitter = (1e-9 * scale)[:, None].expand(-1, products.shape[1])
    return torch.linalg.cholesky(products + torch.diag_embed(jitter))


class _Problem:
    """R objectives: the sum of log losses times the strength, plus half the slopes' squares."""

    def __init__(
        self, inputs: Tensor, truth: Tensor, weight: Tensor, hidden: Tensor, strength: Tensor
    ) -> None:
        """`inputs` (R, N, K + 1) end in the ones of the biases, which have no penalty."""
        self.inputs, self.truth, self.weight = inputs, truth, weight
        self.hidden, self.strength = hidden, strength
        self.decay = inputs.new_ones(1, inputs.shape[2], 1)
        self.decay[:, -1] = 1e-9  # biases alike in all classes change nothing
        self.count = weight.sum(1, keepdim=True)

    def value(self, where: Tensor) -> Tensor:
        """(R, 1, 1)."""
        logits = self.inputs @ where + self.hidden
        losses = logits.logsumexp(2, keepdim=True) * self.weight
        right = (self.truth * logits.masked_fill(self.truth == 0, 0)).sum(2, keepdim=True)
        loss = self.strength * (losses - right).sum(1, keepdim=True)
        return loss + (self.decay * where**2).sum((1, 2), keepdim=True) / 2

    def solve(self, where: Tensor) -> Tensor:
        """The minimum (R, K + 1, C), from `where` on."""
        value = self.value(where)
        squares = (self.inputs**2).sum(1)[..., None]
        for _ in range(ITERATIONS):
            chances = (self.inputs @ where + self.hidden).softmax(2) * self.weight
            gradient = self.strength * self.inputs.mT @ (chances - self.truth) + self.decay * where
            scale = gradient.abs().amax((1, 2), keepdim=True) / (self.strength * self.count)
            done = scale < PRECISE
            if done.all():
                break
            spread = (chances * (1 - chances)).sum((1, 2), keepdim=True) / self.count
            diagonal = self.strength * squares * spread / chances.shape[2] + self.decay
            step = self._newton(gradient, chances, diagonal)
            size = (~done).double()  # a regression does not depend on those beside it
            for _ in range(ITERATIONS):  # halves steps that lead uphill
                moved = self.value(where - size * step)
                worse = moved > value + 1e-12 * value.abs()
                if not worse.any():
                    break
                size = torch.where(worse, size / 2, size)
            where, value = where - size * step, moved
        return where

    def _newton(self, gradient: Tensor, chances: Tensor, diagonal: Tensor) -> Tensor:
        """The inverse Hessian times the gradient."""
        step, rest = torch.zeros_like(gradient), gradient.clone()
        scaled = rest / diagonal
        way, product = scaled, _dot(rest, scaled)
        wanted = 1e-2 * product  # more would be undone by the next step of Newton
        for _ in range(ITERATIONS):
            done = product <= wanted
            if done.all():
                break
            slope = self.inputs @ way
            slope = chances * (slope - (chances * slope).sum(2, keepdim=True))
            bent = self.strength * self.inputs.mT @ slope + self.decay * way
            size = torch.where(done, 0.0, product / _dot(way, bent).clamp(min=1e-300))
            step, rest = step + size * way, rest - size * bent
            scaled = rest / diagonal
            before, product = product, torch.where(done, product, _dot(rest, scaled))
            way = scaled + product / before.clamp(min=1e-300) * way
        return step


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum((1, 2), keepdim=True)

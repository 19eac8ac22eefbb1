"""The argument of a method's hooks, for tests that call them without `fit`."""

from vpt.losses.cross_entropy import CrossEntropy
from vpt.methods.base import Batch, Epoch


def epoch(model, features, labels, splits=None, *, number=0, count=2, batches=(), loss=None):
    """`features`: (N, dim), or a function that computes them as of now."""
    columns = {} if splits is None else {"split": splits}

    def seen():
        now = features() if callable(features) else features
        return Batch(now, labels, columns, cached=True)

    return Epoch(number, count, loss or CrossEntropy(model.target), batches, seen)

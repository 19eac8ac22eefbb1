"""RanPAC: ridge regression on random features, from sums over images (McDonnell et al. 2023)."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from vpt.backbones.base import Backbone, Prompts
from vpt.backbones.text import Tokenizer
from vpt.methods._tokens import TokenOptions, Tokens
from vpt.methods.base import Head, Method
from vpt.methods.linear_probe import ABSENT
from vpt.methods.vpt_deep import VPTDeep

PENALTIES = 10.0 ** torch.arange(-8, 9, dtype=torch.float64)
FITTED = 0.8  # of a task's images; the others choose the penalty


class Options(TokenOptions):
    """Options of RanPAC, and of the prompts of a first session."""

    num_features: PositiveInt = 2000  # random ones; 10,000 in the paper
    seed: NonNegativeInt = 0  # of the random weights, and of which images choose the penalty
    # the held-out images that choose the penalty: those of all tasks so far, or of the last alone,
    # as published
    select: Literal["stream", "task"] = "stream"
    # vpt_deep: prompts are trained on the first task, and then stay
    first_session: Literal["none", "vpt_deep"] = "none"
    gated: bool = True
    project: None = None


class RanPAC(Tokens):
    """`head` (num_features → C), ridge regression on ReLU(features · random_weights).

    The sums of a task's images are added to those before, so no image is kept, and with a penalty
    of one's own the order of tasks makes no difference. Sums and their Cholesky factors are in
    float64: for small penalties float32 is rounding noise.

    Attributes:
        random_weights: (feature_dim, num_features), standard normal, drawn from the seed.
        prompts: those of the first session, which nothing trains here; None without one.
        gram: (2, F) with F = M (M + 1) / 2, the upper triangle of the M random features' products,
            of images that are fitted and of those that choose the penalty; empty before `solve`.
        cross: (2, M, C), their products with labels.
        counts: (C,), number of images of each class.
        penalty: the chosen one.
    """

    Options = Options
    solved = True
    frozen_features = True
    statistics = frozenset({"gram", "cross", "counts"})

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        options: Options,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        if options.first_session == "none":
            Method.__init__(self, backbone, class_names, options, tokenizer)
            self.constant = self.prompts = None
        else:
            super().__init__(backbone, class_names, options, tokenizer)
            for parameter in self.tunable_parameters().values():
                parameter.requires_grad_(False)
        # NumPy never changes these draws
        drawn = np.random.RandomState(options.seed).standard_normal
        weights = torch.from_numpy(drawn((backbone.feature_dim, options.num_features))).float()
        self.register_buffer("random_weights", weights, persistent=False)
        self.head = Head(options.num_features, len(class_names))
        nn.init.zeros_(self.head.weight)  # ridge regression on no image
        self.register_buffer("gram", torch.empty(2, 0, dtype=torch.float64))
        self.register_buffer("cross", torch.empty(2, 0, len(class_names), dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(len(class_names)))
        self.penalty: float | None = None

    def prompted_layers(self) -> list[int]:
        """All."""
        return list(range(self.backbone.num_layers))

    def learned_prompts(self, count: int) -> Prompts | None:
        """Prompts of the first session."""
        return None if self.prompts is None else super().learned_prompts(count)

    def make_constants(self) -> None:
        """Keep the prompts' keys and values, if there are any."""
        if self.prompts is not None:
            super().make_constants()

    def first_session(self) -> Method | None:
        """VPT-deep with these options, on the first task."""
        if self.prompts is None or self.task:
            return None
        tokens = self.options.model_dump(include=set(TokenOptions.model_fields))
        head = "crossfit" if self.options.gated else "random"
        options = VPTDeep.Options(**tokens, head=head)
        session = VPTDeep(self.backbone, self.class_names, options)
        session.target = self.target
        return session

    def adopt(self, session: Method) -> None:
        """Take over prompts and gates."""
        own = dict(self.named_parameters())
        with torch.no_grad():
            for name, value in session.named_parameters():
                if name in own and not name.startswith(("backbone.", "head.")):
                    own[name].copy_(value)

    def make_room(self, tensors: dict[str, Tensor]) -> None:
        """Size the sums as a stream stored them."""
        for name in ("gram", "cross"):
            if name in tensors:
                setattr(self, name, getattr(self, name).new_empty(tensors[name].shape))

    def logits(self, features: Tensor) -> Tensor:
        """Logits (B, C) from image features (B, feature_dim)."""
        return self.head(self._random_features(features))

    def _random_features(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return (features.to(self.random_weights) @ self.random_weights).relu()

    @torch.no_grad()
    def solve(self, features: Tensor, labels: Tensor) -> None:
        """Take features (N, feature_dim) and the labels of N images into the regression."""
        draws = torch.Generator().manual_seed(self.options.seed)
        order = torch.randperm(len(features), generator=draws)
        self.take(features[order], labels[order])

    @torch.no_grad()
    def take(self, features: Tensor, labels: Tensor) -> None:
        """`solve`, where the first images are fitted and the last choose the penalty."""
        device = self.random_weights.device
        truth = self.target.truth(labels, len(self.class_names)).double().to(device)
        rows = self._random_features(features.to(device)).double()
        fitted = int(FITTED * len(rows)) or len(rows)
        parts = [slice(fitted), slice(fitted, None)]
        gram = torch.stack([_packed(rows[part].T @ rows[part]) for part in parts])
        cross = torch.stack([rows[part].T @ truth[part] for part in parts])
        judged, counts = (gram, cross), truth.sum(0)
        if self.task:
            gram, cross, counts = gram + self.gram, cross + self.cross, counts + self.counts
        if self.options.select == "stream":
            judged = gram, cross
        self.gram, self.cross = gram, cross
        self.counts.copy_(counts)
        best = self.losses(*judged).argmin()
        self.penalty = PENALTIES[best].item()
        weight, _ = _ridge(_unpacked(gram.sum(0)), cross.sum(0), self.penalty)
        self.head.weight.copy_(weight.T)
        # a finding is called at a logit of 0, half-way between its labels
        seen = 0.0 if self.target.exclusive else -0.5
        self.head.bias.copy_(torch.where(self.counts > 0, seen, ABSENT))

    @staticmethod
    def losses(gram: Tensor, cross: Tensor) -> Tensor:
        """Summed squared error of held-out images at each penalty (17,), less that of zeros."""
        (fitted, held), found = map(_unpacked, gram), []
        for penalty in PENALTIES.tolist():
            weight, failed = _ridge(fitted, cross[0], penalty)
            loss = (weight * (held @ weight - 2 * cross[1])).sum()
            found.append(loss.new_tensor(torch.inf) if failed else loss)
        return torch.stack(found)


def _ridge(gram: Tensor, cross: Tensor, penalty: float) -> tuple[Tensor, bool]:
    """(gram + penalty · 1)⁻¹ cross, (M, C), and True where rounding leaves that no solution."""
    shifted = gram.clone()
    shifted.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    return torch.cholesky_solve(cross, factor), bool(failed)


def _packed(gram: Tensor) -> Tensor:
    return gram[tuple(torch.triu_indices(*gram.shape, device=gram.device))]


def _unpacked(packed: Tensor) -> Tensor:
    size = int((2 * len(packed)) ** 0.5)
    gram = packed.new_zeros(size, size)
    gram[tuple(torch.triu_indices(size, size, device=packed.device))] = packed
    return gram + gram.triu(1).T

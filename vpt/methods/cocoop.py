"""CoCoOp: a context that each image shifts (Zhou et al. 2022, trainers/cocoop.py)."""

from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from vpt.config import Strict
from vpt.errors import InputError
from vpt.methods._text import TextReadout


class Options(Strict):
    """Options of CoCoOp."""

    num_tokens: PositiveInt = 4  # ignored where `init` gives the words
    init: str | None = "a photo of a"  # words to start from; None: N(0, 0.02²)


class CoCoOp(TextReadout):
    """A small network makes of an image's feature what is added to each vector of the context.

    So class embeddings are an image's own, (B, C, dim), and cost a text tower an image; SOS and
    context run once for all classes of an image.

    Attributes:
        meta_net: Linear(dim → dim/16), ReLU, Linear(→ text_width), on normalised features.
    """

    Options = Options
    frozen_features = True

    def make_state(self) -> None:
        """Make the network."""
        dim = self.backbone.feature_dim
        hidden = max(dim // 16, 1)
        self.meta_net = nn.Sequential(
            nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, self.backbone.text.width)
        )

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Class embeddings (B, C, dim), not normalised, for image features (B, dim).

        Raises:
            InputError: no features.
        """
        if features is None:
            raise InputError(
                "cocoop's class embeddings need image features: text_features(features), with "
                "features from model.features(images)"
            )
        shift = self.meta_net(F.normalize(features, dim=-1))
        return self.encode(self.context + shift[:, None])

    def make_constants(self) -> None:
        """Leave the class embeddings to each image."""
        super(TextReadout, self).make_constants()

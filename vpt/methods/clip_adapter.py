"""CLIP-Adapter: a small network mixed into image features (Gao et al. 2021, clip_adapter.py)."""

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from vpt.methods._templates import TemplateOptions, Templates


class Options(TemplateOptions):
    """Options of CLIP-Adapter."""

    ratio: float = Field(0.2, ge=0, le=1)  # of the adapter's output in the feature
    reduction: PositiveInt = 4  # feature_dim / hidden width


class CLIPAdapter(Templates):
    """Logits are cosine similarities of the templates to ratio · adapter(x) + (1 - ratio) · x.

    This is the authors' form, on features as they come and with a ReLU after both layers; copies
    elsewhere lack the second ReLU (SS-Text) or the norm after mixing (LP++). The authors give no
    training settings; ours are CoOp's.

    Attributes:
        adapter: Linear(dim → dim / reduction), ReLU, Linear(→ dim), ReLU, without biases.
    """

    Options = Options

    def make_state(self) -> None:
        """Make the network."""
        dim = self.backbone.feature_dim
        hidden = max(dim // self.options.reduction, 1)
        self.adapter = nn.Sequential(
            nn.Linear(dim, hidden, bias=False),
            nn.ReLU(),
            nn.Linear(hidden, dim, bias=False),
            nn.ReLU(),
        )

    def logits(self, features: Tensor) -> Tensor:
        """Scaled cosine similarities (B, C) of the mixed features."""
        ratio = self.options.ratio
        return super().logits(ratio * self.adapter(features) + (1 - ratio) * features)

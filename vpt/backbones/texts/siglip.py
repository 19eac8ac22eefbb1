"""open_clip's text towers without a mask, read at the last position: SigLIP's and SigLIP 2's."""

from torch import nn

from vpt.backbones.texts._blocks import Blocks


class Tower(Blocks):
    """Texts are words, end, padding, all of which each token sees: never cut.

    A context enters before the words, and as many pads go.
    """

    family = "SigLIP's"
    start = 0
    placeholder = "of"  # one token in each of their vocabularies; "x" is not
    seen_pads = None

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Any with a biased projection: CLIPA's, whose texts have a begin mark, have no bias."""
        text = getattr(model, "text", None)
        return (
            getattr(text, "pool_type", None) == "last"
            and isinstance(text.text_projection, nn.Linear)
            and text.attn_mask is None
            and text.cls_emb is None
            and not text.use_pad_mask
        )

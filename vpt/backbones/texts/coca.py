"""CoCa's text tower: causal, read at a class token that stands after the padding."""

import torch
from torch import Tensor, nn

from vpt.backbones.texts._blocks import Blocks


class Tower(Blocks):
    """Texts are BOS, words, EOT, padding and the class token, at the last position of all.

    In CoCa's own mask each token counts as padding if the one before it is, so the first pad after
    EOT is seen, and the class token does not see itself. Later pads may be cut.
    """

    family = "CoCa's"
    seen_pads = 1

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Any causal one with a class token."""
        text = getattr(model, "text", None)
        return getattr(text, "cls_emb", None) is not None and text.attn_mask is not None

    def enter(self, embeddings: Tensor) -> Tensor:
        """Embeddings (C, T, width) with positions, and the class token after them."""
        last = self.parts.cls_emb + self.parts.positional_embedding[-1]
        return torch.cat([super().enter(embeddings), last.expand(len(embeddings), 1, -1)], 1)

    def mask(self, ids: Tensor) -> Tensor:
        """(C · heads, T + 1, T + 1): the causal one, and no padding."""
        causal = self.parts.attn_mask[: ids.shape[1] + 1, : ids.shape[1] + 1]
        words = (ids != self.parts.pad_id).to(causal.device)
        always = words.new_ones(len(ids), 1)
        seen = [words, always] if self.parts.correct_cls_mask else [always, words]
        hidden = ~torch.cat(seen, 1)[:, None]
        return causal.masked_fill(hidden, -torch.inf).repeat_interleave(self.parts.heads, 0)

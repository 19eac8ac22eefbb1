"""Linear layers of both towers whose frozen weights are changed, and the text read-out for it."""

from collections.abc import Sequence

from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from vpt.backbones._known import is_exactly
from vpt.backbones._resblock import is_plain
from vpt.backbones.base import share
from vpt.backbones.clip import Adapter
from vpt.backbones.text import Tokenizer
from vpt.errors import InputError
from vpt.methods._templates import TemplateOptions
from vpt.methods._text import ClassEmbeddings, in_parts
from vpt.methods.base import require_clip

CHUNK = 256  # texts whose activations are kept at once
PARTS = {"qkv": 3, "proj": 1, "fc1": 1, "fc2": 1, "c_fc": 1, "c_proj": 1}  # of linear layers


class Change(nn.Module):
    """A change of a weight (out, in)."""

    def delta(self) -> Tensor:
        """The change (out, in)."""
        raise NotImplementedError

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The changed layer's output of x (…, in)."""
        return F.linear(x, weight + self.delta().to(weight.dtype), bias)


class ChangedLinear(nn.Module):
    """A linear layer with a change, which belongs to the method, not to the tower."""

    def __init__(self, linear: nn.Linear, change: Change) -> None:
        super().__init__()
        self.layer, self.held = linear, (change,)

    def forward(self, x: Tensor) -> Tensor:
        """Output (…, out) of x (…, in)."""
        return self.held[0](x, self.layer.weight, self.layer.bias)

    def merged(self) -> nn.Linear:
        """The layer with a weight of its own."""
        self.layer.weight = _sum(self.layer.weight, self.held[0])
        return self.layer


class ChangedAttention(nn.Module):
    """Self-attention whose queries, keys and values have a change, and its output may."""

    def __init__(self, attention: nn.MultiheadAttention, qkv: Change, out: Change | None) -> None:
        super().__init__()
        self.layer, self.held = attention, (qkv, out)

    def forward(
        self,
        x: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Output of nn.MultiheadAttention for x (B, N, width), which is key and value too."""
        layer, (qkv, change) = self.layer, self.held
        x = qkv(x, layer.in_proj_weight, layer.in_proj_bias)
        heads = x.unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if attn_mask is not None and attn_mask.dim() == 3:  # (B · heads, N, N)
            attn_mask = attn_mask.unflatten(0, (-1, layer.num_heads))
        x = F.scaled_dot_product_attention(*heads, attn_mask=attn_mask)
        x, out = x.transpose(1, 2).flatten(2), layer.out_proj
        return (out(x) if change is None else change(x, out.weight, out.bias)), None

    def merged(self) -> nn.MultiheadAttention:
        """The attention with weights of its own."""
        layer, (qkv, change) = self.layer, self.held
        layer.in_proj_weight = _sum(layer.in_proj_weight, qkv)
        if change is not None:
            layer.out_proj.weight = _sum(layer.out_proj.weight, change)
        return layer


def _sum(weight: Tensor, change: Change) -> nn.Parameter:
    return nn.Parameter(weight + change.delta().to(weight.dtype), requires_grad=False)


class ChangedTowers(ClassEmbeddings):
    """Changes beside weights of both towers' blocks; the inference form has merged weights.

    The first of the templates is the classes' text.

    Attributes:
        image_changes, text_changes: in the order of the towers' layers.
        tokens: (C, T) ids of the classes' texts.
    """

    attention_only = False  # True: queries, keys and values alone

    def __init__(
        self,
        backbone: Adapter,
        class_names: Sequence[str],
        options: TemplateOptions,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Build the method.

        Raises:
            InputError: a tower without known attention.
        """
        require_clip(backbone, self.name)
        backbone.identity()  # of the pretrained weights, so before they change
        backbone = share(backbone)  # a bank's methods have one between them
        super().__init__(backbone, class_names, options, tokenizer)
        backbone.exact_tokens = True  # spelled-out blocks read weights past the changes
        names = [name.replace("_", " ") for name in class_names]
        texts = [options.templates[0].replace("{}", name) for name in names]
        self.register_buffer("tokens", backbone.text.tokenize(texts, tokenizer), persistent=False)
        self.register_buffer("class_embeddings", None, persistent=False)
        self.image_changes = self._put_changes("image", backbone.tower.model)
        self.text_changes = self._put_changes("text", backbone.text.parts.transformer)

    def change(self, weights: Sequence[Tensor]) -> Change:
        """A change of the parts (out, in) that one layer holds, at its start none."""
        raise NotImplementedError

    def _put_changes(self, kind: str, tower: nn.Module) -> nn.ModuleList:
        """Put changes into the tower's layers of known attention, and of MLPs."""
        known, changes = False, []
        for parent in list(tower.modules()):
            for name, layer in list(parent.named_children()):
                new = None
                if is_exactly(layer, nn.MultiheadAttention) and is_plain(parent):
                    qkv = self.change(layer.in_proj_weight.chunk(3))
                    out = None if self.attention_only else self.change([layer.out_proj.weight])
                    new = ChangedAttention(layer, qkv, out)
                elif is_exactly(layer, nn.Linear) and self._is_target(parent, name):
                    new = ChangedLinear(layer, self.change(layer.weight.chunk(PARTS[name])))
                if new is not None:
                    setattr(parent, name, new)
                    known |= name in {"attn", "qkv"}
                    changes += [change for change in new.held if change is not None]
        if not known:
            raise InputError(
                f"{self.name} finds no attention that it knows in the {kind} tower: take a CLIP "
                "with plain vision and text transformers, or promptsrc"
            )
        return nn.ModuleList(changes)

    def _is_target(self, parent: nn.Module, name: str) -> bool:
        if name in {"qkv", "proj"} and not is_exactly(parent, Attention):
            return False
        return name == "qkv" or (name in PARTS and not self.attention_only)

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Class embeddings (C, dim), differentiable, not normalised."""
        if self.class_embeddings is not None:
            return self.class_embeddings
        return in_parts(self._encode, self.tokens.split(CHUNK))

    def _encode(self, tokens: Tensor) -> Tensor:
        tower = self.backbone.text
        return tower.run(tower.embed(tokens), tokens)

    def make_constants(self) -> None:
        """Keep the class embeddings, and weights of its own with the changes in them."""
        super().make_constants()
        self.class_embeddings = self.text_features()
        for parent in list(self.backbone.model.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, ChangedLinear | ChangedAttention):
                    setattr(parent, name, layer.merged())
        self.backbone.exact_tokens = False

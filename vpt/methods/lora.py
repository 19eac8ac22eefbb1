"""LoRA, by PEFT: low-rank changes of frozen weights (Hu et al. 2022)."""

from collections.abc import Sequence

import torch
from pydantic import Field, PositiveInt
from torch import nn

from vpt.backbones.base import Backbone
from vpt.backbones.clip import Tokenizer
from vpt.errors import InputError
from vpt.methods._linear import LinearOptions, LinearReadout

# The first of these that the tower calls: attention, or the MLP where attention reads its weights
# without calling them (BEiT's, EVA's). PEFT knows open_clip's attention, but merges into the frozen
# weights and subtracts again at every pass, with a rounding error each time.
TARGETS = (("attn.qkv",), ("mlp.fc1", "mlp.fc2"), ("mlp.c_fc", "mlp.c_proj"))


class Options(LinearOptions):
    """Options of LoRA."""

    rank: PositiveInt = 4
    alpha: float = Field(8.0, gt=0)  # the change is alpha / rank · B·A
    dropout: float = Field(0.0, ge=0, lt=1)  # on the change's input


class LoRA(LinearReadout):
    """Low-rank A and B beside each target of the image tower, and a linear head."""

    Options = Options

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        options: Options,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Add LoRA's weights to the backbone's linear layers.

        Raises:
            InputError: PEFT is not installed; a backbone without any of the targets.
        """
        try:
            import peft
        except ImportError:
            raise InputError("lora needs PEFT: pip install 'visual-prompt-tuning[peft]'") from None
        backbone.identity()  # of the pretrained weights, so before LoRA's are among them
        super().__init__(backbone, class_names, options, tokenizer)
        self.backbone.exact_tokens = True  # spelled-out blocks read weights past PEFT's layers
        called = self._called()
        found = ([name for name in called if name.endswith(group)] for group in TARGETS)
        names = next(filter(None, found), None)
        if names is None:
            raise InputError(
                f"lora finds no linear layers of attention or MLP that {backbone.family} calls: "
                "take bias_tuning or vpt_deep"
            )
        config = peft.LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=names,
        )
        peft.inject_adapter_in_model(config, backbone.image_tower)

    @torch.no_grad()
    def _called(self) -> list[str]:
        """The linear layers that a forward of the image tower calls, by name."""
        tower, preprocess = self.backbone.image_tower, self.backbone.preprocess
        side = preprocess.image_size
        linear = {m: name for name, m in tower.named_modules() if isinstance(m, nn.Linear)}
        called: set[str] = set()
        hooks = [
            m.register_forward_hook(lambda module, *_: called.add(linear[module])) for m in linear
        ]
        self.backbone(torch.zeros(1, preprocess.channels, side, side, device=self.backbone.device))
        for hook in hooks:
            hook.remove()
        return [name for name in linear.values() if name in called]

    def make_constants(self) -> None:
        """Merge the changes into weights of its own."""
        super().make_constants()
        for module in self.backbone.modules():
            if hasattr(module, "lora_A") and not module.merged:
                module.merge(safe_merge=True)  # into a copy: the frozen weights are shared

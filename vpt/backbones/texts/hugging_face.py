"""BERT and RoBERTa of Hugging Face as open_clip's text tower, such as BiomedCLIP's."""

from collections.abc import Sequence

import torch
from open_clip.hf_model import HFTextEncoder, MaxPooler
from torch import Tensor, nn

from vpt.backbones.text import TextPrompts, Tokenizer
from vpt.backbones.texts._blocks import overwrite
from vpt.backbones.texts._marked import Marked


class Tower(Marked):
    """Texts are [CLS], words, [SEP], padding, which is masked by the texts' own ids."""

    family = "Hugging Face's BERT and RoBERTa"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.width = self.parts.config.hidden_size
        self.num_layers = self.parts.config.num_hidden_layers

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Any of these types; open_clip's maximum pooling fails in the model itself."""
        text = getattr(model, "text", None)
        return (
            isinstance(text, HFTextEncoder)
            and text.config.model_type in {"bert", "roberta", "xlm-roberta"}
            and not isinstance(text.pooler, MaxPooler)
        )

    def encode(self, texts: Sequence[str], tokenizer: Tokenizer | None = None) -> Tensor:
        """Text features (len(texts), dim), not normalised."""
        ids = self.tokenize(texts, tokenizer)
        return self.run(self.embed(ids), ids)

    def embed(self, ids: Tensor) -> Tensor:
        """Word embeddings (…, width) of ids (…), before those of position and type."""
        embedding = self.parts.transformer.get_input_embeddings()
        return embedding(ids.to(embedding.weight.device))

    def run(
        self,
        embeddings: Tensor,
        ids: Tensor,
        prompts: TextPrompts | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Text features (C, dim), not normalised."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        model, deep = self.parts.transformer, 0 if prompts is None else len(prompts)
        words = (ids != self.parts.config.pad_token_id).to(embeddings.device)
        x = model.embeddings(inputs_embeds=embeddings)
        mask = x.new_zeros(words.shape).masked_fill(~words, -torch.inf)[:, None, None]
        for index, layer in enumerate(model.encoder.layer):
            if 0 < index <= deep:
                x = overwrite(x, prompts[index - 1], places)
            x = self.remember(layer, x, mask)
        pooled = None if model.pooler is None else model.pooler(x)
        output = BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=pooled)
        return self.parts.proj(self.parts.pooler(output, words.long()))

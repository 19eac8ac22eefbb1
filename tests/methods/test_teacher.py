"""A CLIP method with prompts in both towers and a teacher: one class, nothing else touched."""

import pytest
import torch
from tiny import NAMES, clip, fixed, images
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vpt
from vpt.methods._text import embed_classes
from vpt.methods.base import Step
from vpt.methods.ivlp import IVLP


class Taught(IVLP):
    """Features and class embeddings stay near those of the bare towers."""

    def __init__(self, backbone, class_names, options, tokenizer=None):
        super().__init__(backbone, class_names, options, tokenizer)
        teacher = embed_classes(backbone, class_names, ["a photo of a {}."], tokenizer)
        self.register_buffer("teacher", teacher, persistent=False)

    def frozen_columns(self, images):
        return {"teacher": self.backbone(images)}

    def step(self, batch, loss):
        features, texts = self.batch_features(batch), self.text_features()
        logits = self.similarities(features, texts)
        terms = {
            "cross_entropy": loss(logits, batch.labels),
            "image": 1 - F.cosine_similarity(features, batch.columns["teacher"]).mean(),
            "text": 1 - F.cosine_similarity(texts, self.teacher).mean(),
        }
        return Step(sum(terms.values()), logits, terms)


def test_it_trains_saves_and_loads(tmp_path):
    torch.manual_seed(0)
    backbone = fixed(clip())
    model = vpt.attach(backbone, Taught, class_names=NAMES)
    before = {name: p.clone() for name, p in model.tunable_parameters().items()}
    assert before.keys() >= {"prompts", "context", "text_prompts"}
    data = DataLoader(TensorDataset(images(7), torch.tensor([0, 1, 2, 2, 0, 1, 1])), 3)
    history = vpt.fit(model, data, config={"epochs": 3, "lr": 0.01, "schedule": "constant"})
    assert history[-1]["terms"].keys() == {"cross_entropy", "image", "text"}
    assert history[-1]["loss"] == pytest.approx(sum(history[-1]["terms"].values()))
    assert all(not torch.equal(p, before[n]) for n, p in model.tunable_parameters().items())
    path = vpt.save(model, tmp_path / "taught.safetensors")
    again = vpt.load(path, backbone, method=Taught)
    torch.testing.assert_close(again(images()), model(images()), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.fold()(images()), model(images()), rtol=1e-5, atol=1e-5)

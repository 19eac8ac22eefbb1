"""A method that picks prompts for each image by a query pass: one class, nothing else touched."""

from typing import Literal

import pytest
import torch
from tiny import NAMES, clip, fixed, images, vit
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vpt
from vpt.backbones.base import Prompts
from vpt.methods._linear import LinearOptions, LinearReadout
from vpt.methods.base import Step


class Options(LinearOptions):
    """Options of a pool of prompts."""

    pool: int = 5
    chosen: int = 2
    num_tokens: int = 3
    head: Literal["random"] = "random"


class Pool(LinearReadout):
    """Prompts whose keys are nearest an image's bare features, as L2P; their outputs are read."""

    Options = Options

    def __init__(self, backbone, class_names, options, tokenizer=None):
        super().__init__(backbone, class_names, options, tokenizer)
        self.keys = nn.Parameter(torch.randn(options.pool, backbone.feature_dim))
        shape = options.pool, options.num_tokens, backbone.width
        self.prompts = nn.Parameter(torch.randn(shape))

    @property
    def feature_dim(self):
        return self.backbone.width

    def frozen_columns(self, images):
        return {"query": self.backbone(images)}

    def nearest(self, query):
        similarity = F.normalize(query, dim=-1) @ F.normalize(self.keys, dim=-1).T
        return similarity.topk(self.options.chosen)

    def pick(self, ids):
        return Prompts([self.prompts[ids].flatten(1, 2)], [0], read=True)

    def image_prompts(self, images):
        return self.pick(self.nearest(self.backbone(images)).indices)

    def read(self, images, prompts):
        return self.backbone.tokens(images, prompts).prompts.mean(1)

    def step(self, batch, loss):
        similarity, ids = self.nearest(batch.columns["query"])
        logits = self.logits(self.read(batch.inputs, self.pick(ids)))
        terms = {"cross_entropy": loss(logits, batch.labels), "pull": 1 - similarity.mean()}
        return Step(sum(terms.values()), logits, terms)


@pytest.mark.parametrize("make", [vit, clip])
def test_each_image_has_its_own_prompts(make):
    torch.manual_seed(0)
    model = vpt.attach(make(), Pool, class_names=NAMES).eval()
    x = images(6)
    features = model.backbone(x)
    model.keys.data = features[:5] - features.mean(0)
    ids = model.nearest(model.backbone(x)).indices
    assert len({tuple(row) for row in ids.tolist()}) > 1
    alone = torch.cat([model(x[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(model(x), alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.fold()(x), alone, rtol=1e-5, atol=1e-5)
    exact = model.backbone
    exact.exact_tokens = True
    torch.testing.assert_close(model(x), alone, rtol=1e-5, atol=1e-5)
    assert model.feature_maps(x)[0].shape[:2] == (6, model.backbone.width)


def test_it_trains_saves_and_loads(tmp_path):
    torch.manual_seed(0)
    backbone = fixed(vit())
    model = vpt.attach(backbone, Pool, class_names=NAMES)
    before = {name: p.clone() for name, p in model.tunable_parameters().items()}
    data = DataLoader(TensorDataset(images(7), torch.tensor([0, 1, 2, 2, 0, 1, 1])), 3)
    history = vpt.fit(model, data, config={"epochs": 5, "lr": 0.01, "schedule": "constant"})
    assert history[-1]["terms"].keys() == {"cross_entropy", "pull"}
    assert history[-1]["loss"] == pytest.approx(sum(history[-1]["terms"].values()))
    assert history[-1]["terms"]["pull"] < history[0]["terms"]["pull"]
    assert all(not torch.equal(p, before[n]) for n, p in model.tunable_parameters().items())
    path = vpt.save(model, tmp_path / "pool.safetensors")
    again = vpt.load(path, backbone, method=Pool)
    torch.testing.assert_close(again(images()), model(images()), rtol=1e-6, atol=1e-6)

"""A method that picks prompts for each image by a query pass: one class, nothing else touched."""

from typing import Literal

import pytest
import torch
from tiny import NAMES, clip, fixed, images, loader, samples, vit
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


QUERY = ["l2p", "dual_prompt", "coda_prompt"]


def drawn_apart(method, **options):
    """A model whose images differ in what they pick."""
    torch.manual_seed(0)
    model = vpt.attach(vit(depth=4), method, class_names=NAMES, **options).eval()
    x = images(6)
    features = model.backbone(x)
    with torch.no_grad():
        keys = model.keys.view(-1, *model.keys.shape[-2:])
        keys.copy_(-features.mean(0).expand_as(keys))
        keys[:, :5] = (features - features.mean(0))[:5]
    return model, x


@pytest.mark.parametrize("method", QUERY)
def test_an_answer_does_not_depend_on_batch_mates(method):
    model, x = drawn_apart(method)
    query = model.backbone(x)
    if method == "dual_prompt":
        assert len(set(model.found(query)[0].tolist())) > 2
    alone = torch.cat([model(x[i : i + 1]) for i in range(6)])
    for batch in (x, x.flip(0), torch.cat([x, x[:1].expand(20, -1, -1, -1)])):
        order = [(batch == one).flatten(1).all(1).nonzero()[0, 0] for one in x]
        torch.testing.assert_close(model(batch)[torch.stack(order)], alone, rtol=1e-5, atol=1e-5)
    model.train()
    model.begin_task(1, 2)
    own = [model.features(x[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(model.features(x), torch.cat(own), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", QUERY)
def test_the_query_pass_is_shared_up_to_the_first_prompted_block(method, monkeypatch):
    late = {
        "l2p": {"layer": 3},
        "dual_prompt": {"general_layers": [], "task_layers": [3]},
        "coda_prompt": {"layers": [3]},
    }
    model, x = drawn_apart(method, **late[method])
    assert model.passes == 2 - 3 / 4
    apart = model.logits(model.read(x, model.image_prompts(x)))
    calls, block = [], model.backbone.block

    def counted(index, *rest):
        calls.append(index)
        return block(index, *rest)

    monkeypatch.setattr(model.backbone, "block", counted)
    torch.testing.assert_close(model(x), apart, rtol=1e-5, atol=1e-5)
    assert len(calls) == model.passes * model.backbone.num_layers


@pytest.mark.parametrize("method", QUERY)
def test_training_asks_for_the_query_once(method, monkeypatch):
    model = vpt.attach(vit(), method, class_names=NAMES)
    asked, columns = [], type(model).frozen_columns
    monkeypatch.setattr(
        type(model), "frozen_columns", lambda self, x: asked.append(len(x)) or columns(self, x)
    )
    settings = {"epochs": 3, "lr": 1e-3, "schedule": "constant"}
    vpt.fit(model, loader(model, samples([0, 1, 2, 0, 1, 2, 2]), 4), config=settings)
    assert sum(asked) == 7

"""Methods against numbers of the official implementations: outputs, gradients, trajectories."""

import pytest
import torch
from golden_case import Case, assert_close, cases, golden_json
from timm.models.vision_transformer import VisionTransformer

import vpt
from vpt.config import TrainConfig
from vpt.engine.train import make_optimizer
from vpt.methods.base import Head

# every size, option and word is from a case's sidecar, so another variant may take its place
VPT = cases("src/models/vit_prompt/vit.py")
COOP = cases("trainers/coop.py")
COCOOP = cases("trainers/cocoop.py")


def vpt_tensors(case, prefix):
    """The case's tensors under the names of this package."""
    tensors = case.under(prefix)
    deep = [tensors.pop("deep_prompt")] if "deep_prompt" in tensors else []
    tensors["prompts"] = torch.cat([tensors.pop("prompt"), *deep])
    return {name.replace("prompt_proj.", "projection."): t for name, t in tensors.items()}


def vpt_model(name):
    case = Case(name)
    prompt = case.config["prompt"]
    model = vpt.attach(
        case.backbone(),
        "vpt_deep" if prompt["deep"] else "vpt_shallow",
        num_classes=case.config["num_classes"],
        num_tokens=prompt["num_tokens"],
        project=None if prompt["project"] == -1 else prompt["project"],
        dropout=prompt["dropout"],
    )
    model.load_state_dict(vpt_tensors(case, "init."), strict=False)
    return case, model


def coop_model(name):
    case = Case(name)
    prompt = case.config["prompt"]
    model = vpt.attach(
        case.backbone(),
        "coop",
        class_names=case.config["classnames"],
        num_tokens=prompt["n_ctx"],
        init=prompt["ctx_init"] or None,
        position=prompt["class_token_position"],
        class_specific=prompt["class_specific"],
    )
    model.load_state_dict({"context": case["init.ctx"]}, strict=False)
    return case, model


def check_training(case, model, grads, final):
    """Loss, gradients and five optimiser steps on one batch."""
    settings = case.config["optimiser"]
    config = TrainConfig(
        optimizer=settings["type"].lower(),
        **{key: settings[key] for key in ("lr", "momentum", "weight_decay")},
    )
    optimizer = make_optimizer(model, config)
    model.train()
    for step in range(settings["steps"]):
        loss, _ = model.loss(case["input.images"], case["input.labels"])
        assert_close(loss, case["expected.step_losses"][step], 1e-4)
        loss.backward()
        if step == 0:
            assert_close(loss, case["expected.loss"])
            assert grads.keys() == model.tunable_parameters().keys()
            for name, parameter in model.tunable_parameters().items():
                assert_close(parameter.grad, grads[name])
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.tunable_parameters().items():
        assert_close(parameter, final[name], 1e-4)
    loss, _ = model.loss(case["input.images"], case["input.labels"])
    assert_close(loss, case["expected.loss_after"], 1e-4)


@pytest.mark.parametrize("exact_tokens", [False, True])
@pytest.mark.parametrize("name", VPT)
def test_vpt(name, exact_tokens):
    case, model = vpt_model(name)
    model.backbone.exact_tokens = exact_tokens
    assert_close(model.backbone(case["input.images"]), case["expected.features_unprompted"])
    assert_close(model.features(case["input.images"]), case["expected.features"])
    assert_close(model(case["input.images"]), case["expected.logits"])
    check_training(case, model, vpt_tensors(case, "grad."), vpt_tensors(case, "final."))


@pytest.mark.parametrize("exact_tokens", [False, True])
@pytest.mark.parametrize("name", COOP)
def test_coop(name, exact_tokens):
    case, model = coop_model(name)
    model.backbone.exact_tokens = exact_tokens
    length = model.tokens.shape[1]
    assert torch.equal(model.tokens, case["input.tokens"][:, :length])
    assert not case["input.tokens"][:, length:].any()
    embeddings = case["expected.prompt_embeddings"]  # of the first classes
    count, shown = len(embeddings), min(length, embeddings.shape[1])
    assert_close(model.prompt_embeddings()[:count, :shown], embeddings[:, :shown])
    normalized = torch.nn.functional.normalize(model.text_features(), dim=-1)
    assert_close(normalized, case["expected.text_features"])
    assert_close(model(case["input.images"]), case["expected.logits"])
    check_training(case, model, {"context": case["grad.ctx"]}, {"context": case["final.ctx"]})


@pytest.mark.parametrize("exact_tokens", [False, True])
@pytest.mark.parametrize("name", COCOOP)
def test_cocoop(name, exact_tokens):
    case = Case(name)
    prompt = case.config["prompt"]
    words = {"num_tokens": prompt["n_ctx"], "init": prompt["ctx_init"] or None}
    names = case.config["classnames"]
    model = vpt.attach(case.backbone(), "cocoop", class_names=names, **words)
    init, grads, final = (_cocoop_tensors(case, part) for part in ("init.", "grad.", "final."))
    if words["init"]:
        assert_close(model.context, init["context"])
    model.load_state_dict(init, strict=False)
    model.backbone.exact_tokens = exact_tokens
    features = torch.nn.functional.normalize(model.features(case["input.images"]), dim=-1)
    assert_close(features, case["expected.image_features"])
    assert_close(model.meta_net(features), case["expected.ctx_shift"])
    assert_close(model(case["input.images"]), case["expected.logits"])
    check_training(case, model, grads, final)


def _cocoop_tensors(case, prefix):
    """The case's tensors under the names of this package."""
    names = {"ctx": "context", "meta_net.linear1": "meta_net.0", "meta_net.linear2": "meta_net.2"}
    tensors = case.under(prefix)
    for theirs, ours in names.items():
        tensors = {name.replace(theirs, ours): tensor for name, tensor in tensors.items()}
    return tensors


@pytest.mark.parametrize("name", COOP)
def test_cutting_after_the_longest_text_is_exact(name):
    case, model = coop_model(name)
    full = model.backbone.model.encode_text(case["input.tokens"])
    assert_close(full, case["expected.text_features_unprompted"])
    cut = model.backbone.encode_embeddings(
        model.backbone.embed_tokens(model.tokens), model.tokens.argmax(1)
    )
    assert_close(cut, full)


@pytest.mark.parametrize("row", golden_json("vpt_init")["prompt_init"]["rows"], ids=str)
def test_prompt_initialisation(row):
    size = row["patch"] * 2
    backbone = VisionTransformer(
        size, row["patch"], embed_dim=row["hidden"], depth=2, num_heads=1, num_classes=0
    )
    project = None if row["project"] == -1 else row["project"]
    model = vpt.attach(backbone, "vpt_deep", num_classes=2, num_tokens=500, project=project)
    assert model.prompts.abs().max().item() == pytest.approx(row["v"], rel=1e-2)
    assert model.prompts.abs().max() <= row["v"]
    assert model.prompts.std().item() == pytest.approx(row["uniform_std_v_over_sqrt3"], rel=1e-2)
    if project:
        weight, bias = model.projection.weight, model.projection.bias
        std = row["proj_weight"]["std_theory_sqrt(2/hidden)"]
        assert weight.std().item() == pytest.approx(std, rel=2e-2)
        assert bias.abs().max() <= row["proj_bias"]["bound_1/sqrt(project)"]


@pytest.mark.parametrize("row", golden_json("vpt_init")["head_init"]["rows"], ids=str)
def test_head_initialisation(row):
    head = Head(row["in_dim"], row["classes"])
    std = row["weight_std_theory_sqrt(2/classes)"]
    assert head.weight.std().item() == pytest.approx(std, rel=5e-2)
    assert torch.all(head.bias == torch.tensor(row["bias_min"]))

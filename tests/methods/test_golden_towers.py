"""Methods through CLIP's towers against numbers of the official implementations."""

import re

import pytest
import torch
from golden_case import Case, assert_close
from torch.nn.functional import normalize

import vpt
from vpt.config import TrainConfig
from vpt.losses.cross_entropy import CrossEntropy
from vpt.methods.base import Batch
from vpt.methods.promptsrc import epoch_weights
from vpt.training.fit import make_optimizer

EXACT = pytest.mark.parametrize("exact_tokens", [False, True])


def step(case, model):
    images = case["input.images"]
    with torch.no_grad():
        batch = Batch(images, case["input.labels"], model.frozen_columns(images))
    return model.step(batch, CrossEntropy(model.target))


def check_training(case, model, grads, final, terms=()):
    """Loss, its terms (by the case's names), gradients, and five optimiser steps on one batch."""
    settings = case.config["optimiser"]
    config = TrainConfig(
        optimizer=settings["type"].lower(), lr=settings["lr"], weight_decay=settings["weight_decay"]
    )
    optimizer = make_optimizer(model, config)
    model.train()
    for number in range(settings["steps"]):
        found = step(case, model)
        assert_close(found.total, case["expected.step_losses"][number], 1e-4)
        found.total.backward()
        if number == 0:
            for name, theirs in dict(terms).items():
                assert_close(found.terms[name], case[theirs])
            assert grads.keys() == model.tunable_parameters().keys()
            for name, parameter in model.tunable_parameters().items():
                assert_close(parameter.grad, grads[name], 5e-5)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.tunable_parameters().items():
        assert_close(parameter, final[name], 1e-4)
    model.eval()


def promptsrc_tensors(case, prefix):
    tensors = case.under(prefix)
    deep = {
        kind: [tensors[n] for n in sorted(tensors) if n.startswith(f"{kind}_deep_ctx")]
        for kind in ("text", "visual")
    }
    return {
        "context": tensors["ctx"],
        "text_prompts": torch.stack(deep["text"]),
        "prompts": torch.stack([tensors["visual_ctx"], *deep["visual"]]),
    }


def promptsrc():
    case = Case("promptsrc")
    prompt = case.config["prompt"]
    model = vpt.attach(
        case.backbone(),
        "promptsrc",
        class_names=case.config["classnames"],
        num_tokens=prompt["n_ctx_text"],
        text_depth=prompt["depth_text"],
        num_image_tokens=prompt["n_ctx_vision"],
        image_depth=prompt["depth_vision"],
        init=prompt["ctx_init"],
    )
    init = promptsrc_tensors(case, "init.")
    assert init.keys() == model.tunable_parameters().keys() == model.artifact_tensors().keys()
    model.load_state_dict(init, strict=False)
    return case, model


@EXACT
def test_promptsrc(exact_tokens):
    case, model = promptsrc()
    model.backbone.exact_tokens = exact_tokens
    inputs = case["input.images"]
    assert_close(model(inputs), case["expected.logits"])
    step(case, model)
    assert_close(model.teacher_texts, case["expected.teacher_text_features"])
    teacher = model.frozen_columns(inputs)["teacher"]
    assert_close(normalize(teacher, dim=-1), case["expected.teacher_image_features"])
    terms = {"cross_entropy": "ce", "text": "text", "image": "image", "logits": "logits"}
    check_training(
        case,
        model,
        promptsrc_tensors(case, "grad."),
        promptsrc_tensors(case, "final."),
        {ours: f"expected.loss_{theirs}" for ours, theirs in terms.items()},
    )
    assert_close(model(inputs), case["expected.logits_after"], 1e-4)


def test_weights_of_promptsrc_over_epochs():
    case = Case("promptsrc")
    settings = case.config["gpa"]
    others = settings["other_settings"].items()
    rows = [((settings["epochs"], settings["mean"], settings["std"]), settings["weights"])]
    rows += [(tuple(map(int, name.split(","))), weights) for name, weights in others]
    for (count, mean, std), expected in rows:
        assert epoch_weights(count, mean, std) == pytest.approx(expected, rel=1e-9, abs=1e-40)
    weights = torch.tensor(epoch_weights(20, 15, 1), dtype=torch.float32)
    sequence = case["input.gpa_sequence"]
    assert_close(torch.einsum("e,eij->ij", weights, sequence), case["expected.gpa_result"])
    assert epoch_weights(5, 500, 1)[-1] == pytest.approx(1)  # far off, yet a mean


MMRL = {"mmrl": "mmrl", "mmrlpp": "mmrlpp", "alignednorm": "mmrlpp"}  # case → method


def mmrl_tensors(case, prefix):
    """The case's tensors under the names of this package."""
    tensors = case.under(prefix)
    named = {"representations": tensors["rep_tokens"]}
    for side, maps in {"vision": "image_maps", "text": "text_maps"}.items():
        for theirs, ours in {"weight": "weight", "A": "left", "B": "right", "bias": "bias"}.items():
            pattern = re.compile(rf"{side}_proj\.\d+\.{theirs}")
            layers = [tensors[n] for n in sorted(tensors) if pattern.fullmatch(n)]
            if layers:
                named[f"{maps}.{ours}"] = torch.stack(layers)
        if f"{side}_proj.weight" in tensors:
            named[f"{maps}.weight"] = tensors[f"{side}_proj.weight"][None]
    if "proj_rep" in tensors:
        return named | {"projection.weight": tensors["proj_rep"]}
    left, right = (tensors[f"proj_rep.{factor}"] for factor in "AB")
    return named | {"projection.left": left, "projection.right": right}


def mmrl(name):
    case = Case(name)
    prompt, config = case.config["prompt"], case.config["config"]
    backbone = case.backbone()
    with torch.no_grad():
        backbone.logit_scale.fill_(100).log_()  # a constant there
    options = {"beta": prompt["beta"], "rank": prompt["rank"]} if "beta" in prompt else {}
    if "proj_rank" in prompt:
        options["projection_rank"] = prompt["proj_rank"]
    if "final_norm" in config:
        options |= {"final_norm": config["final_norm"], "sequence_norm": config["seq_norm"]}
    model = vpt.attach(
        backbone,
        MMRL[name],
        class_names=case.config["classnames"],
        num_tokens=prompt["n_rep_tokens"],
        dim=prompt["rep_dim"],
        first_block=prompt["rep_layers"][0],
        alpha=config["alpha"],
        weight=config["reg_weight"],
        templates=[prompt["prompt_text"][1].replace(case.config["classnames"][1], "{}")],
        **options,
    )
    init = mmrl_tensors(case, "init.")
    assert init.keys() == model.tunable_parameters().keys() == model.artifact_tensors().keys()
    model.load_state_dict(init, strict=False)
    return case, model


@EXACT
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", MMRL)
def test_mmrl(name, cached, exact_tokens):
    case, model = mmrl(name)
    model.backbone.exact_tokens = exact_tokens
    model.options = model.options.model_copy(update={"cache_blocks": cached})
    inputs = case["input.images"]
    assert ("lower" in model.frozen_columns(inputs)) == cached
    for side, maps in {"vision": model.image_maps, "text": model.text_maps}.items():
        for number, tokens in enumerate(maps(model.representations)):
            assert_close(tokens, case[f"expected.{side}_tokens.{number}"])
    own, tokens = model.features(inputs).chunk(2, 1)
    assert_close(normalize(own, dim=-1), case["expected.image_features"])
    assert_close(normalize(tokens, dim=-1), case["expected.image_features_rep"])
    texts = model.text_features()
    assert_close(normalize(texts, dim=-1), case["expected.text_features"])
    assert_close(model.similarities(own, texts), case["expected.logits"])
    assert_close(model.similarities(tokens, texts), case["expected.logits_rep"])
    assert_close(model(inputs), case["expected.logits_fusion"])
    assert_close(model.teacher_texts, case["expected.text_features_unprompted"])
    teacher = model.frozen_columns(inputs)["teacher"]
    assert_close(teacher, case["expected.image_features_unprompted"])
    found, config = step(case, model), case.config["config"]
    factors = [config["alpha"], 1 - config["alpha"], config["reg_weight"], config["reg_weight"]]
    factors += [config[key] for key in ("final_norm", "seq_norm") if key in config]
    terms = case["expected.step_loss_terms"][0]
    for factor, ours, theirs in zip(factors, found.terms.values(), terms, strict=True):
        assert_close(ours, factor * theirs, 5e-5)
    check_training(case, model, mmrl_tensors(case, "grad."), mmrl_tensors(case, "final."))
    assert_close(model(inputs), case["expected.logits_fusion_after"], 1e-4)
    assert_close(model.fold()(inputs), case["expected.logits_fusion_after"], 1e-4)


SIDES = {"vision": "image_changes", "text": "text_changes"}
PARTS = [["q", "k", "v"], ["o"], ["fc1"], ["fc2"]]


def svd_tensors(case, prefix):
    """Of each changed layer (parts, rank), under the names of this package."""
    tensors, named = case.under(prefix), {}
    for side, changes in SIDES.items():
        blocks = range(len({n.split(".")[1] for n in tensors if n.startswith(side)}))
        layers = [[f"{side}.{b}.{part}" for part in parts] for b in blocks for parts in PARTS]
        for number, parts in enumerate(layers):
            stacked = torch.stack([tensors[name] for name in parts])
            named[f"{changes}.{number}.differences"] = stacked
    return named


def test_clip_svd():
    case = Case("clip_svd")
    backbone = case.backbone()
    with torch.no_grad():
        backbone.logit_scale.fill_(100).log_()  # a constant there
    names = case.config["classnames"]
    template = case.config["prompt"]["prompt_text"][1].replace(names[1], "{}")
    model = vpt.attach(backbone, "clip_svd", class_names=names, templates=[template])
    start, grads, final = (svd_tensors(case, part) for part in ("init.", "grad.", "final."))
    assert start.keys() == model.tunable_parameters().keys() == model.artifact_tensors().keys()
    inputs, settings = case["input.images"], case.config["optimiser"]
    features, texts = model.features(inputs), model.text_features()
    assert_close(normalize(features, dim=-1), case["expected.image_features"])
    assert_close(normalize(texts, dim=-1), case["expected.text_features"])
    assert_close(model(inputs), case["expected.logits"])
    optimizer = torch.optim.AdamW(model.parameters(), settings["lr"], weight_decay=0)
    decay = settings["lr"] * settings["weight_decay"]
    for number in range(settings["steps"]):
        found = step(case, model)
        assert_close(found.total, case["expected.step_losses"][number], 1e-4)
        optimizer.zero_grad()
        found.total.backward()
        for name, parameter in model.tunable_parameters().items():
            if number == 0:
                assert_close(parameter.grad, grads[name], 5e-5)
            with torch.no_grad():  # the original decays singular values, not their differences
                parameter.sub_(decay * (start[name] + parameter))
        optimizer.step()
    for name, parameter in model.tunable_parameters().items():
        assert_close(start[name] + parameter, final[name], 1e-4)
    assert_close(model.eval()(inputs), case["expected.logits_after"], 1e-4)
    folded = model.fold()
    assert_close(folded(inputs), case["expected.logits_after"], 1e-4)
    weight = folded.backbone.model.visual.transformer.resblocks[0].mlp.c_fc.weight
    assert_close(weight, case["expected.merged_weight.vision.0.fc1"], 1e-4)

"""Methods on cached features against numbers of the official implementations."""

import math

import pytest
import torch
from families import build
from golden_case import Case, assert_close
from hooks import epoch
from tiny import clip, images
from torch import nn
from torch.nn import functional as F

import vpt
from vpt.backbones.clip import Adapter
from vpt.config import TrainConfig
from vpt.losses.cross_entropy import CrossEntropy
from vpt.methods.base import Batch
from vpt.methods.prograd import agreeing
from vpt.training.fit import make_optimizer


@pytest.fixture
def attach(monkeypatch):
    """Attaches to a CLIP whose text tower gives the text features (C, templates, dim)."""

    def make(method, texts, scale=100.0, **options):
        backbone = clip(embed_dim=texts.shape[-1], width=options.pop("width", 32))
        with torch.no_grad():
            backbone.logit_scale.fill_(math.log(scale))
        monkeypatch.setattr(Adapter, "encode_texts", lambda *_: texts.flatten(0, 1))
        names = [f"class {number}" for number in range(len(texts))]
        templates = [f"{{}} {number}" for number in range(texts.shape[1])]
        return vpt.attach(backbone, method, class_names=names, templates=templates, **options)

    return make


def optimizer(case, parameters):
    settings = dict(case.config["optimiser"])
    kind = getattr(torch.optim, settings["type"])
    known = {"lr", "momentum", "weight_decay", "eps", "betas"} & settings.keys()
    return kind(parameters, **{key: settings[key] for key in known})


def step(model, features, labels):
    return model.step(Batch(features, labels, cached=True), CrossEntropy(model.target))


def check_steps(case, model, name, batches, learned):
    """First gradient, the losses of the steps, and the tensor after them.

    `name` is the tensor's in the case, `learned` in this package.
    """
    parameter = model.tunable_parameters()[learned]
    with torch.no_grad():
        parameter.copy_(case[f"init.{name}"])
    descent = optimizer(case, model.tunable_parameters().values())
    for number, (features, labels) in enumerate(batches):
        total = step(model, features, labels).total
        assert_close(total, case["expected.step_losses"][number])
        total.backward()
        if number == 0:
            assert_close(parameter.grad, case[f"grad.{name}"])
        descent.step()
        descent.zero_grad()
    assert_close(parameter, case[f"final.{name}"])


def full_batches(case):
    """The whole training set, once for each step of the case."""
    return [(case["input.train_features"], case["input.train_labels"])] * (
        case.config["optimiser"]["steps"]
    )


def test_taskres(attach):
    case = Case("taskres")
    model = attach("taskres", case["input.text_features"], alpha=case.config["config"]["alpha"])
    assert_close(model.class_embeddings, case["expected.base_text_features"])
    assert_close(model.logits(case["input.test_features"]), case["expected.test_logits"])
    with torch.no_grad():
        model.residuals.copy_(case["input.probe_residuals"])
    probe = step(model, case["input.train_features"], case["input.train_labels"])
    assert_close(probe.logits, case["expected.probe_logits"])
    assert_close(probe.total, case["expected.probe_loss"])
    (gradient,) = torch.autograd.grad(probe.total, model.residuals)
    assert_close(gradient, case["expected.probe_grad"])
    check_steps(case, model, "text_feature_residuals", full_batches(case), "residuals")
    assert_close(model.logits(case["input.test_features"]), case["expected.test_logits_after"])


def test_clip_adapter(attach):
    case = Case("clip_adapter")
    config, inputs = case.config["config"], case["input.test_features"]
    reduction = config["d"] // config["hidden"]
    texts = case["input.text_features"][:, None]
    model = attach("clip_adapter", texts, ratio=config["ratio"], reduction=reduction)
    for layer in (0, 2):
        with torch.no_grad():
            model.adapter[layer].weight.copy_(case[f"init.fc.{layer}.weight"])
    assert_close(model.adapter(inputs), case["expected.adapter_output"])
    assert_close(model.logits(inputs), case["expected.test_logits"])
    descent = optimizer(case, model.tunable_parameters().values())
    for number, batch in enumerate(full_batches(case)):
        total = step(model, *batch).total
        assert_close(total, case["expected.step_losses"][number])
        total.backward()
        if number == 0:
            for layer in (0, 2):
                assert_close(model.adapter[layer].weight.grad, case[f"grad.fc.{layer}.weight"])
        descent.step()
        descent.zero_grad()
    for layer in (0, 2):
        assert_close(model.adapter[layer].weight, case[f"final.fc.{layer}.weight"])
    assert_close(model.logits(inputs), case["expected.test_logits_after"])


def test_tip_adapter(attach):
    case = Case("tip_adapter")
    config = {key: case.config["config"][key] for key in ("alpha", "beta")}
    model = attach("tip_adapter", case["input.text_features"], **config)
    val, test = case["input.val_features"], case["input.test_features"]
    assert_close(F.normalize(model.class_embeddings, dim=-1).T, case["expected.clip_weights"])
    assert_close(model.logits(val), case["expected.zero_shot_logits_val"])
    model.solve(case["input.cache_features"].mean(0), case["input.cache_labels"])
    assert_close(model.keys.T, case["expected.cache_keys"])
    assert torch.equal(model.values, case["expected.cache_values"])
    assert_close(model.logits(val), case["expected.tip_logits_val"])
    searched = {key: case.config["search"][f"best_{key}"] for key in ("alpha", "beta")}
    model.options = model.options.model_copy(update=searched)
    assert_close(model.logits(test), case["expected.tip_logits_test_searched"])


def test_tip_adapter_f(attach):
    case = Case("tip_adapter_f")
    config = {key: case.config["config"][key] for key in ("alpha", "beta", "lr", "epochs")}
    size = case.config["config"]["bs"]
    texts = case["input.clip_weights"].T[:, None]
    model = attach("tip_adapter_f", texts, batch_size=size, **config)
    keys, values = case["input.cache_keys"].T, case["input.cache_values"]
    model.make_room({"keys": keys})
    with torch.no_grad():
        model.keys.copy_(keys)
        model.values.copy_(values)
    batches = [
        batch
        for features, labels in zip(
            case["input.train_features"], case["input.train_labels"], strict=True
        )
        for batch in zip(features.split(size), labels.split(size), strict=True)
    ]
    logits = model.logits(batches[0][0])
    assert_close(logits, case["expected.train_logits_first_batch"])
    loss = model.target.loss(logits, batches[0][1])
    (gradient,) = torch.autograd.grad(loss, model.keys)
    assert_close(gradient, case["grad.weight"])
    losses = model.descend(batches)
    assert_close(torch.tensor(losses), case["expected.step_losses"])
    assert_close(model.keys, case["final.weight"])
    assert_close(
        model.logits(case["input.test_features"]), case["expected.test_logits_per_epoch"][-1]
    )


@pytest.mark.parametrize("name", ["zs_lp", "clap"])
def test_zero_shot_initialised_probe(attach, name):
    case = Case(name)
    model = attach(name, case["input.text_features"])
    features, labels = case["input.train_features"], case["input.train_labels"]
    assert_close(model.prototypes, case["init.prototypes"])
    assert_close(model.logits(features), case["expected.zero_shot_logits_train"])
    assert_close(model.logits(case["input.test_features"]), case["expected.test_logits"])
    if name == "clap":
        assert_close(model.confidence(features, labels), case["expected.lambda"])
        model.penalties.copy_(case["expected.lambda"])
    rows = case["input.batch_rows"]
    with torch.no_grad():
        model.prototypes.copy_(case["input.probe_prototypes"])
    probe = step(model, features[rows[0]], labels[rows[0]])
    for term, expected in {"cross_entropy": "loss_ce", "penalty": "loss_penalty"}.items():
        if term in probe.terms:
            assert_close(probe.terms[term], case[f"expected.probe_{expected}"])
    assert_close(probe.total, case["expected.probe_loss"])
    (gradient,) = torch.autograd.grad(probe.total, model.prototypes)
    assert_close(gradient, case["expected.probe_grad"])
    batches = [(features[row], labels[row]) for row in rows]
    check_steps(case, model, "prototypes", batches, "prototypes")
    assert_close(model.logits(case["input.test_features"]), case["expected.test_logits_after"])


def test_clap_where_a_class_has_no_image(attach):
    case = Case("clap")
    model = attach("clap", case["input.text_features"])
    labels = case["input.labels_missing_class"]
    expected = case["expected.lambda_missing_class"]
    mean = expected.nanmean().item()  # there, the class's is not a number
    found = model.confidence(case["input.train_features"], labels)
    assert expected.isnan().any()
    assert_close(found, expected.nan_to_num(mean))


@pytest.mark.parametrize("name", ["ss_text", "ss_text_plus"])
def test_ss_text(attach, name):
    case = Case(name)
    texts, test = case["input.text_features"], case["input.test_features"]
    model = attach(name, texts)
    features, labels = case["input.train_features"], case["input.train_labels"]
    assert_close(model.prototypes, case["init.prototypes"])
    assert_close(model.logits(test), case["expected.zero_shot_logits_test"])
    model.solve(features, labels)
    assert_close(model.prototypes, case["expected.prototypes"])
    assert_close(model.logits(test), case["expected.test_logits"])
    assert_close(model.logits(features).softmax(-1), case["expected.train_probabilities"])
    if name == "ss_text":
        truth = F.one_hot(labels, len(texts)).float()
        fixed = model.blend(features, truth, torch.full((len(texts),), 0.1))
        assert_close(fixed, case["expected.prototypes_fixed"])
        known = attach("clap", texts).confidence(features, labels)
        blended = model.blend(features, truth, known)
        assert_close(blended, case["expected.prototypes_performance"])


@pytest.mark.parametrize("name", ["ss_text", "ss_text_plus"])
def test_penalties_of_ss_text_have_a_least_value(attach, name):
    case = Case(name)
    texts, labels = case["input.large_prototypes"], case["input.large_labels"].long()
    model = attach(name, texts[:, None])
    model.class_embeddings.copy_(texts)
    truth = F.one_hot(labels, len(texts)).float()
    found = model.blend(case["input.large_features"].float(), truth, model.penalties(truth))
    assert_close(found, case["expected.large_prototypes"])


def prolip_model(attach, case):
    """ProLIP at the start of its case, and how its tensors and features come from the case's."""
    config = case.config["config"]
    texts, options = case["input.text_features"], {"penalty": config["lambda_value"]}
    if "init.adapter" in case.tensors:
        model = attach("prolip", texts, width=config["d"], **options)
        proj = case["input.proj"]
        return model, lambda x: x @ proj, lambda w: w.T, case["init.adapter"], "adapter"
    model = attach("prolip", texts, width=config["pre_projection"], **options)
    if "init.proj.weight" in case.tensors:
        model.bias.copy_(case["input.proj.bias"])
        return model, lambda x: x, lambda w: w.T, case["init.proj.weight"], "proj.weight"
    return model, lambda x: x, lambda w: w, case["init.proj"], "proj"


@pytest.mark.parametrize("name", ["prolip", "prolip_rn", "prolip_rla"])
def test_prolip(attach, name):
    case = Case(name)
    model, features, turned, start, learned = prolip_model(attach, case)
    labels, test = case["input.train_labels"], features(case["input.test_features"])
    views = [features(view) for view in case["input.train_features"]]
    with torch.no_grad():
        model.weight.copy_(turned(start))
    model.start.copy_(turned(start))
    assert_close(F.normalize(model.class_embeddings, dim=-1).T, case["expected.clip_weights"])
    assert_close(model.logits(test), case["expected.zero_shot_logits_test"])
    with torch.no_grad():
        model.weight.copy_(turned(case["input.probe_weight"]))
    probe = step(model, views[0], labels)
    assert_close(probe.terms["cross_entropy"], case["expected.probe_loss_ce"])
    distance = probe.terms["penalty"] / model.penalty
    assert_close(distance, case["expected.probe_loss_penalty"])
    assert_close(probe.total, case["expected.probe_loss"])
    (gradient,) = torch.autograd.grad(probe.total, model.weight)
    assert_close(turned(gradient), case["expected.probe_grad"])
    with torch.no_grad():
        model.weight.copy_(turned(start))
    rates = case["expected.learning_rates"].tolist()
    settings = case.config["optimiser"]
    config = TrainConfig(lr=rates[0], eps=settings["eps"], weight_decay=settings["weight_decay"])
    descent = make_optimizer(model, config)
    grads = [case[f"grad.{learned}"], case["expected.grad_step2"]]
    for number, view in enumerate(case["expected.view_order"].tolist()):
        descent.param_groups[0]["lr"] = rates[number]
        now = step(model, views[view], labels)
        assert_close(now.total, case["expected.step_losses"][number])
        now.total.backward()
        if number < 2:
            assert_close(turned(model.weight.grad), grads[number])
        descent.step()
        descent.zero_grad()
    assert_close(turned(model.weight), case[f"final.{learned}"])
    assert_close(model.logits(test), case["expected.test_logits_after"])


@pytest.mark.parametrize("head", [None, nn.Sequential(nn.Linear(16, 16), nn.GELU())])
@pytest.mark.parametrize("family", ["clip_custom_text", "coca", "eva02_clip", "swin_clip"])
def test_prolip_starts_as_zero_shot(family, head):
    """A tower may project by a matrix, otherwise or not at all."""
    backbone, names = build(family), ["cat", "dog", "owl"]
    has_head = hasattr(backbone.visual, "head")
    if head and not has_head:
        pytest.skip("open_clip's own tower has a matrix or none")
    if head:
        backbone.visual.head = head
    model = vpt.attach(backbone, "prolip", class_names=names).eval()
    assert model.projects == (head is None)
    expected = vpt.attach(backbone, "zero_shot", class_names=names).eval()(images())
    assert_close(model(images()), expected)
    dim = model.backbone.feature_dim
    if has_head:  # nothing, or nothing linear, to start from
        assert torch.equal(model.weight, torch.eye(dim))
    else:
        assert torch.equal(model.weight, backbone.visual.proj)


def test_prolip_penalises_by_the_images_of_a_class(attach):
    model = attach("prolip", Case("prolip")["input.text_features"], width=28)
    labels = torch.tensor([0, 0, 0, 1, 3, 3])  # one of five classes has three, two have none
    model.before_epoch(epoch(model, torch.zeros(6, 28), labels))
    assert model.penalty == pytest.approx(3 / 6)


def test_lp_pp(attach):
    case = Case("lp_pp")
    model = attach("lp_pp", case["input.text_features"])
    unit = F.normalize(case["input.train_features"], dim=-1)
    labels, test = case["input.train_labels"], case["input.test_features"]
    texts = F.normalize(model.class_embeddings, dim=-1)
    assert_close(texts.T, case["expected.clip_weights"])
    model.start(unit, labels)
    assert_close(model.head.weight, case["init.weight"])
    assert_close(model.alpha, case["init.alpha"])
    with torch.no_grad():
        model.head.bias.copy_(case["init.bias"])
    assert_close(model.logits(unit), case["expected.train_logits"])
    assert_close(model.logits(test), case["expected.training_free_test_logits"])
    rates = model.step_sizes(unit)
    assert_close(rates[0], case["expected.lr_weight"])
    assert_close(rates[1], case["expected.lr_alpha"])
    loss = model.target.loss(model.logits(unit), labels)
    loss.backward()
    for name in ("weight", "bias"):
        assert_close(getattr(model.head, name).grad, case[f"grad.{name}"])
    assert_close(model.alpha.grad, case["grad.alpha"])
    model.zero_grad()
    losses = model.descend(unit, labels, *rates, case.config["config"]["steps"])
    assert_close(torch.tensor(losses), case["expected.step_losses"])
    for name in ("weight", "bias"):
        assert_close(getattr(model.head, name), case[f"final.{name}"])
    assert_close(model.alpha, case["final.alpha"])
    assert_close(model.logits(test), case["expected.test_logits_after"])


def test_prograd_takes_away_what_goes_against_the_teacher():
    case = Case("prograd_surgery")
    config, settings = case.config["config"], case.config["optimiser"]
    parameters = [torch.nn.Parameter(case[f"init.p{i}"]) for i in range(len(config["tensors"]))]
    descent = optimizer(case, parameters)
    for number in range(settings["steps"]):
        given, expected = (case.under(f"{part}.step{number}.") for part in ("input", "expected"))
        for index, parameter in enumerate(parameters):
            own, general = (given[f"{kind}_grad.p{index}"] for kind in ("ce", "kl"))
            parameter.grad = agreeing(own, general, config["lambda_"])
            assert_close(parameter.grad, expected[f"grad.p{index}"])
        descent.step()
        for index, parameter in enumerate(parameters):
            assert_close(parameter, expected[f"p{index}"])

"""Continual methods against numbers of the official implementations."""

import math

import pytest
import torch
from golden_case import Case, assert_close
from tiny import attach, images, loader, samples, vit

import vpt
import vpt.artifact
from vpt.losses.cross_entropy import CrossEntropy
from vpt.methods._query import cosines
from vpt.methods.base import Batch
from vpt.methods.ranpac import RanPAC

# Head widths divide feature widths
BACKBONE = {"embed_dim": 24, "num_heads": 2, "num_classes": 0}


def names(count):
    return [f"class {number}" for number in range(count)]


def test_class_means():
    case = Case("simple_cil")
    model = vpt.attach(vit(**BACKBONE), "class_means", class_names=names(7))
    features, labels = case["input.train_features"], case["input.train_labels"]
    test, truth = case["input.test_features"], case["input.test_labels"]
    seen = 0
    for task, size in enumerate(case.config["config"]["tasks"]):
        own = (labels >= seen) & (labels < seen + size)
        seen += size
        model.begin_task(task, 3)
        model.solve(features[own], labels[own])
        logits = model.logits(test[truth < seen])
        assert_close(logits[:, :seen], case[f"expected.logits.task{task}"], 1e-5)
        right = (logits.argmax(1) == truth[truth < seen]).double().mean() * 100
        assert right.item() == pytest.approx(case["expected.accuracy"][task].item(), abs=0.006)
    assert_close(model.head.weight, case["expected.prototypes"], 1e-5)


def ranpac(case, **options):
    options = {"num_features": case.config["config"]["M"], **options}
    model = vpt.attach(vit(**BACKBONE), "ranpac", class_names=names(7), **options)
    model.random_weights.copy_(case["input.projection"])
    return model


def whole(packed):
    """The sum of both parts of packed triangles, as one symmetric matrix."""
    size = int(math.sqrt(2 * packed.shape[1]))
    gram = torch.zeros(size, size, dtype=packed.dtype)
    gram[tuple(torch.triu_indices(size, size))] = packed.sum(0)
    return (gram + gram.triu(1).T).float()


def test_ranpac():
    case = Case("ranpac")
    model = ranpac(case, select="task")
    test, truth = case["input.test_features"], case["input.test_labels"]
    seen = 0
    for task, size in enumerate(case.config["config"]["tasks"]):
        features = case[f"input.train_features.task{task}"]
        labels = case[f"input.train_labels.task{task}"]
        seen += size
        model.begin_task(task, 3)
        before = model.gram, model.cross
        model.take(features, labels)
        assert model.penalty == case["expected.lambda"][task].item()
        assert_close(whole(model.gram), case[f"expected.G.task{task}"], 1e-5)
        assert_close(model.cross.sum(0).float(), case[f"expected.Q.task{task}"], 1e-5)
        assert_close(model.head.weight[:seen], case[f"expected.weight.task{task}"])
        logits = model.logits(test[truth < seen])
        assert_close(logits[:, :seen], case[f"expected.logits.task{task}"], 1e-5)
        right = (logits.argmax(1) == truth[truth < seen]).double().mean() * 100
        assert right.item() == pytest.approx(case["expected.accuracy"][task].item(), abs=0.006)
        own = [
            new - old if task else new
            for new, old in zip((model.gram, model.cross), before, strict=True)
        ]
        held = len(labels) - int(0.8 * len(labels))
        losses = ((RanPAC.losses(*own) + held) / (held * 7)).float()
        assert_close(losses[9:], case["expected.ridge_losses"][task, 9:], 1e-5)


def test_ranpac_in_another_order_has_the_same_sums():
    case = Case("ranpac")
    model, other = ranpac(case, select="task"), ranpac(case, select="task")
    for one, tasks in ((model, [0, 1, 2]), (other, case.config["other_order"]["tasks"])):
        for number, task in enumerate(tasks):
            one.begin_task(number, 3)
            data = case[f"input.train_features.task{task}"], case[f"input.train_labels.task{task}"]
            one.take(*data)
    torch.testing.assert_close(other.gram, model.gram)
    torch.testing.assert_close(other.cross, model.cross)
    assert (model.penalty, other.penalty) == (100, 1000)
    fixed = torch.linalg.solve(
        whole(other.gram).double() + model.penalty * torch.eye(64), other.cross.sum(0)
    )
    assert_close(fixed.T.float(), case["expected.order.weight_fixed_lambda"])
    stream = [ranpac(case), ranpac(case)]
    for one, tasks in zip(stream, ([0, 1, 2], [2, 0, 1]), strict=True):
        for number, task in enumerate(tasks):
            one.begin_task(number, 3)
            one.take(
                case[f"input.train_features.task{task}"], case[f"input.train_labels.task{task}"]
            )
    assert stream[0].penalty == stream[1].penalty
    assert_close(stream[1].head.weight, stream[0].head.weight)


class Masked(CrossEntropy):
    """Over the classes of the case's task."""

    def __init__(self, model, classes):
        super().__init__(model.target)
        self.known, self.total = classes["known"], classes["total"]

    def __call__(self, logits, labels):
        own = logits[:, self.known : self.total]
        return super().__call__(own, labels - self.known)


def query_model(case, method, **options):
    """The method on the case's backbone, with its head, at its task."""
    model = vpt.attach(case.backbone(), method, class_names=names(7), **options)
    model.begin_task(case.config["classes"]["task"], 3)
    put(model.head, weight=case["init.head.weight"], bias=case["init.head.bias"])
    return model


def put(module, **tensors):
    with torch.no_grad():
        for name, tensor in tensors.items():
            getattr(module, name).copy_(tensor)


def query_batch(case, model):
    inputs = case["input.images"]
    with torch.no_grad():
        columns = model.frozen_columns(inputs)
    assert_close(columns["query"], case["expected.query"], 1e-5)
    return Batch(inputs, case["input.labels"], columns)


def take_steps(case, model, batch, loss, rates=None, constant=0):
    """Adam steps on one batch; gradients of the first. `constant` is what our loss lacks."""
    settings = case.config["optimiser"]
    adam = torch.optim.Adam(model.tunable_parameters().values(), settings["lr"])
    first = None
    for number in range(settings["steps"]):
        if rates is not None:
            adam.param_groups[0]["lr"] = rates[number].item()
        step = model.step(batch, loss)
        assert_close(step.total + constant, case["expected.step_losses"][number], 1e-5)
        adam.zero_grad()
        step.total.backward()
        if first is None:
            first = {n: p.grad.clone() for n, p in model.tunable_parameters().items()}
        adam.step()
    return first


def test_l2p():
    case = Case("l2p")
    sizes = case.config["prompt"]
    model = query_model(
        case, "l2p", pool=sizes["pool"], num_tokens=sizes["length"], chosen=sizes["top_k"]
    )
    shift = case["backbone.pos_embed"][0, 0]
    put(model, prompts=case["init.prompt"] + shift, keys=case["init.key"])
    batch, loss = query_batch(case, model), Masked(model, case.config["classes"])
    query = batch.columns["query"]
    assert_close(cosines(query, model.keys), case["expected.similarity"], 1e-5)
    model.eval()
    assert_close(model.features(batch.inputs), case["expected.features"], 1e-5)
    assert_close(model(batch.inputs), case["expected.logits"], 1e-5)
    assert (model(batch.inputs) - case["voted.logits"]).abs().max() > 0.1
    step = model.train().step(batch, loss)
    assert_close(step.terms["cross_entropy"], case["expected.loss_ce"], 1e-5)
    assert_close(step.terms["pull"], -0.1 * case["expected.reduce_sim"], 1e-5)
    gradients = take_steps(case, model, batch, loss)
    for ours, theirs in (("prompts", "prompt"), ("keys", "key"), ("head.weight", "head.weight")):
        assert_close(gradients[ours], case[f"grad.{theirs}"], 1e-5)
    assert_close(model.prompts - shift, case["final.prompt"], 1e-5)
    assert_close(model.keys, case["final.key"], 1e-5)
    assert_close(model.eval()(batch.inputs), case["expected.logits_after"], 1e-5)


def test_dual_prompt():
    case = Case("dual_prompt")
    sizes = case.config["prompt"]
    model = query_model(
        case,
        "dual_prompt",
        general_layers=sizes["g_layers"],
        general_rows=sizes["g_length"],
        task_layers=sizes["e_layers"],
        task_rows=sizes["e_length"],
        pool=sizes["pool"],
    )
    put(model, general=case["init.g_prompt"], prompts=case["init.e_prompt"])
    put(model, keys=case["init.key"][None])
    batch, loss = query_batch(case, model), Masked(model, case.config["classes"])
    model.eval()
    found = model.found(batch.columns["query"])
    assert torch.equal(found[0], case["expected.indices_test"][:, 0])
    assert_close(model(batch.inputs), case["expected.logits_test"], 1e-5)
    model.train()
    assert_close(model(batch.inputs), case["expected.logits_train"], 1e-5)
    step = model.step(batch, loss)
    assert_close(step.total, case["expected.loss"], 1e-5)
    gradients = take_steps(case, model, batch, loss)
    for ours, theirs in (("general", "g_prompt"), ("prompts", "e_prompt"), ("keys", "key")):
        expected = case[f"grad.{theirs}"]
        assert_close(gradients[ours].view_as(expected), expected, 1e-5)
        final = case[f"final.{theirs}"]
        assert_close(model.tunable_parameters()[ours].view_as(final), final, 1e-5)
    assert_close(model.eval()(batch.inputs), case["expected.logits_test_after"], 1e-5)


def test_a_task_of_dual_prompt_starts_as_the_one_before():
    model = vpt.attach(vit(), "dual_prompt", class_names=names(3))
    keys = model.keys.clone()
    model.begin_task(1, 3)
    assert torch.equal(model.prompts[:, :, 1], model.prompts[:, :, 0])
    assert torch.equal(model.keys, keys)


def test_coda_prompt():
    case = Case("coda_prompt")
    sizes = case.config["prompt"]
    model = vpt.attach(
        case.backbone(),
        "coda_prompt",
        class_names=names(7),
        components=sizes["pool"],
        num_rows=sizes["length"] // 2,
        layers=sizes["layers"],
        orthogonality=sizes["mu"],
    )
    put(model.head, weight=case["init.head.weight"], bias=case["init.head.bias"])
    ours = {"P": model.prompts, "K": model.keys, "A": model.attention}
    with torch.no_grad():
        for task, prefix in enumerate(("gs_first", "gs")):
            model.begin_task(task, 3)
            for name, tensor in ours.items():
                for layer in range(2):
                    draws = case[f"{prefix}.draws.{name}.layer{layer}"]
                    if task:  # the earlier ones are given, as training left them
                        tensor[layer, :2] = case[f"init.{name}.layer{layer}"][:2]
                    model.start(tensor[layer], draws.view(2, *tensor.shape[2:]))
                    expected = case[f"init.{name}.layer{layer}"]
                    if not task:
                        expected = case[f"gs_first.expected.{name}.layer{layer}"]
                    assert_close(tensor[layer][: len(expected)], expected, 1e-5)
    batch, loss = query_batch(case, model), Masked(model, case.config["classes"])
    query = batch.columns["query"]
    for layer, weights in enumerate(model.weights(query)):
        assert_close(weights, case[f"expected.weights.layer{layer}"], 1e-5)
    for layer, rows in enumerate(model.pick(query).sets):
        for got, name in ((rows.key, "k_rows"), (rows.value, "v_rows")):
            got = got.transpose(1, 2).flatten(2)
            assert_close(got, case[f"expected.{name}.layer{layer}"], 1e-5)
    assert_close(model.eval()(batch.inputs), case["expected.logits"], 1e-5)
    step = model.train().step(batch, loss)
    assert_close(step.terms["orthogonality"], case["expected.prompt_loss"], 1e-5)
    assert_close(step.total, case["expected.loss"], 1e-5)
    rates = case["expected.learning_rates"]
    gradients = take_steps(case, model, batch, loss, rates)
    for (theirs, tensor), name in zip(ours.items(), ("prompts", "keys", "attention"), strict=True):
        for layer in range(2):
            assert_close(gradients[name][layer], case[f"grad.{theirs}.layer{layer}"], 1e-5)
            assert_close(tensor[layer], case[f"final.{theirs}.layer{layer}"], 1e-5)
    assert_close(model.eval()(batch.inputs), case["expected.logits_after"], 1e-5)


def test_dual_prompt_with_keys_a_layer():
    """The second official DualPrompt, in CODA-Prompt's repository."""
    case = Case("dual_prompt_coda")
    sizes, layers = case.config["prompt"], case.config["prompt"]["e_layers"]
    model = query_model(
        case,
        "dual_prompt",
        general_layers=sizes["g_layers"],
        general_rows=sizes["g_length"] // 2,
        task_layers=layers,
        task_rows=sizes["e_length"] // 2,
        pool=sizes["pool"],
        keys_per_layer=True,
        pull=len(case["input.images"]),  # there a sum over images, of 1 - cosine
    )

    def stacked(prefix):
        """Tensors by our names: there the first half of a length is keys, the second values."""
        prompts = torch.stack([case[f"{prefix}.e_prompt.layer{layer}"] for layer in layers])
        return {
            "general": case[f"{prefix}.g_prompt.layer0"].unflatten(0, (2, -1))[None],
            "prompts": prompts.unflatten(2, (2, -1)).transpose(1, 2),
            "keys": torch.stack([case[f"{prefix}.key.layer{layer}"] for layer in layers]),
        }

    put(model, **stacked("init"))
    batch, loss = query_batch(case, model), Masked(model, case.config["classes"])
    model.eval()
    found = model.found(batch.columns["query"])
    assert found.tolist() == [case[f"derived.indices_test.layer{i}"].tolist() for i in layers]
    assert not torch.equal(found[0], found[1])
    assert_close(model(batch.inputs), case["expected.logits_test"], 1e-5)
    assert_close(model.train()(batch.inputs), case["expected.logits_train"], 1e-5)
    rates, constant = case["expected.learning_rates"], len(layers) * len(batch.labels)
    gradients = take_steps(case, model, batch, loss, rates, constant)
    for prefix, ours in (("grad", gradients), ("final", model.tunable_parameters())):
        for name, expected in stacked(prefix).items():
            assert_close(ours[name], expected, 1e-5)
    assert_close(model.eval()(batch.inputs), case["expected.logits_test_after"], 1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_a_first_session_trains_prompts_that_then_stay(gated, tmp_path):
    backbone = vit()
    model = attach(backbone, "ranpac", first_session="vpt_deep", num_features=30, gated=gated)
    assert model.tunable_parameters().keys() == {"head.weight", "head.bias"}
    start = model.prompts.clone()
    bare = model.features(images())
    settings = {"epochs": 3, "lr": 0.05, "schedule": "constant"}
    first = loader(model, samples([0, 1, 0, 1, 0, 1, 0, 1]))
    history = vpt.fit(model, first, config=settings)
    learned = model.prompts.clone()
    assert not torch.equal(learned, start) and "loss" not in history[-1]
    assert not torch.allclose(model.features(images()), bare)
    model.begin_task(1, 2)
    counts = model.counts.clone()
    vpt.fit(model, loader(model, samples([2, 2, 2, 2, 1])), config=settings)
    assert torch.equal(model.prompts, learned)
    assert (model.counts - counts).tolist() == [0, 1, 4]
    path = vpt.save(model, tmp_path / "prompt.safetensors")
    assert torch.equal(vpt.load(path, backbone)(images()), model(images()))
    assert "gram" not in vpt.artifact.read(path)[0]


def test_a_second_fit_of_one_task_starts_anew():
    for method in ("class_means", "ranpac"):
        model = attach(vit(), method)
        data = loader(model, samples([0, 1, 2, 0]))
        for _ in range(2):
            vpt.fit(model, data)
            assert model.counts.tolist() == [2, 1, 1]

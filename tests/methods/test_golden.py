"""Methods against numbers of the official implementations: outputs, gradients, trajectories."""

import re

import pytest
import torch
from golden_case import Case, assert_close, cases, golden_json
from timm.models.vision_transformer import VisionTransformer

import vpt
from vpt.config import TrainConfig
from vpt.losses.cross_entropy import CrossEntropy
from vpt.methods.base import Batch, Head
from vpt.training.fit import make_optimizer

# every size, option and word is from a case's sidecar, so another variant may take its place
VPT = cases("src/models/vit_prompt/vit.py")
COOP = cases("trainers/coop.py")
COCOOP = cases("trainers/cocoop.py")
JOINT = [
    *cases("trainers/independentVL.py"),
    *cases("trainers/maple.py"),
    *cases("trainers/vpt.py"),
]


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


def joint_model(name):
    """IVLP, MaPLe or VPT on CLIP (IVLP with a fixed text) at the start of its case."""
    case = Case(name)
    prompt = case.config["prompt"]
    options = {"init": prompt["ctx_init"] or None}
    if "prompt_depth" in prompt:
        options |= {"num_tokens": prompt["n_ctx"], "depth": prompt["prompt_depth"]}
    else:
        options["num_image_tokens"] = prompt["n_ctx_vision"]
        options["image_depth"] = prompt["depth_vision"]
        options["text_depth"] = prompt.get("depth_text", 0)
        options["num_tokens"] = prompt.get("n_ctx_text", 1)
    method = "maple" if "prompt_depth" in prompt else "ivlp"
    names = case.config["classnames"]
    model = vpt.attach(case.backbone(), method, class_names=names, **options)
    init = joint_tensors(case, "init.")
    assert init.keys() == model.tunable_parameters().keys() == model.artifact_tensors().keys()
    model.load_state_dict(init, strict=False)
    return case, model


def joint_tensors(case, prefix):
    """The case's tensors under the names of this package."""
    tensors, named = case.under(prefix), {}
    if "ctx" in tensors:
        named["context"] = tensors["ctx"]
    for name, start in {"text_prompts": r"(text_)?deep_ctx", "prompts": "visual_"}.items():
        sets = {int(re.sub(r"\D", "", n) or 0): t for n, t in tensors.items() if re.match(start, n)}
        if sets:
            named[name] = torch.stack([sets[layer] for layer in sorted(sets)])
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"(deep_)?proj\.(?:(\d+)\.)?(weight|bias)", name):
            deep, number, part = found.groups()
            named[f"couplings.{int(number) + 1 if deep else 0}.{part}"] = tensor
    return named


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
    if "expected.loss_after" in case.tensors:
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
    assert_close(model.prompt_embeddings(model.context)[:count, :shown], embeddings[:, :shown])
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


@pytest.mark.parametrize("exact_tokens", [False, True])
@pytest.mark.parametrize("name", JOINT)
def test_prompts_in_both_towers(name, exact_tokens):
    case, model = joint_model(name)
    inputs = case["input.images"]
    model.backbone.exact_tokens = exact_tokens
    assert_close(model.backbone(inputs), case["expected.image_features_unprompted"])
    for found, expected in zip(model.prompts, expected_prompts(case), strict=True):
        assert_close(found, expected)
    features, texts = model.features(inputs), model.text_features()
    assert_close(torch.nn.functional.normalize(features, dim=-1), case["expected.image_features"])
    assert_close(torch.nn.functional.normalize(texts, dim=-1), case["expected.text_features"])
    assert_close(model(inputs), case["expected.logits"])
    check_training(case, model, joint_tensors(case, "grad."), joint_tensors(case, "final."))
    assert_close(model(inputs), case["expected.logits_after"], 1e-4)


def expected_prompts(case):
    """The image prompts of a case: given, or coupled to the text's."""
    coupled = case.under("expected.visual_")
    if not coupled:
        return joint_tensors(case, "init.")["prompts"]
    deep = [coupled[name] for name in sorted(coupled) if name.startswith("deep")]
    return [coupled["ctx"], *deep]


@pytest.mark.parametrize("exact_tokens", [False, True])
@pytest.mark.parametrize("name", JOINT)
def test_forms_of_prompts_in_both_towers(name, exact_tokens, tmp_path):
    case, model = joint_model(name)
    model.eval().backbone.exact_tokens = exact_tokens
    inputs, expected = case["input.images"], case["expected.logits"]
    folded = model.fold()
    assert_close(folded(inputs), expected)
    assert not folded.class_embeddings.requires_grad
    path = vpt.save(model, tmp_path / "prompt.safetensors")
    loaded = vpt.load(path, case.backbone())
    assert_close(loaded(inputs), expected)
    names = case.config["classnames"]
    swapped = vpt.load(path, case.backbone(), class_names=names[::-1])
    assert_close(swapped(inputs), expected.flip(1))


@pytest.mark.parametrize("name", JOINT)
def test_prompts_in_both_towers_are_exported(name, tmp_path):
    pytest.importorskip("torch", "2.15")  # older exporters know fewer operators
    onnxruntime = pytest.importorskip("onnxruntime")
    from vpt.export import export

    case, model = joint_model(name)
    export(model, tmp_path / "prompt.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "prompt.onnx")
    (logits,) = session.run(["logits"], {"images": case["input.images"].numpy()})
    assert_close(torch.from_numpy(logits), case["expected.logits"], 1e-4)


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
    tower = model.backbone.text
    cut = tower.run(tower.embed(model.tokens), model.tokens)
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


@pytest.mark.parametrize("exact_tokens", [False, True])
def test_kgcoop(exact_tokens):
    case = Case("kgcoop")
    prompt, names = case.config["prompt"], case.config["classnames"]
    first = names[0].replace("_", " ")
    model = vpt.attach(
        case.backbone(),
        "kgcoop",
        class_names=names,
        num_tokens=prompt["n_ctx"],
        init=prompt["ctx_init"] or None,
        weight=case.config["loss"]["W"],
        templates=[prompt["teacher_text"][0].replace(first, "{}")],
    )
    model.load_state_dict({"context": case["init.ctx"]}, strict=False)
    model.backbone.exact_tokens = exact_tokens
    inputs, texts = case["input.images"], model.text_features()
    normalize = torch.nn.functional.normalize
    assert_close(normalize(model.teacher, dim=-1), case["expected.teacher_text_features"])
    assert_close(normalize(texts, dim=-1), case["expected.text_features"])
    assert_close(model.distance(texts), case["expected.kg_score"])
    step = model.step(Batch(inputs, case["input.labels"]), CrossEntropy(model.target))
    assert_close(step.logits, case["expected.logits"])
    assert_close(step.terms["cross_entropy"], case["expected.loss_ce"])
    check_training(case, model, {"context": case["grad.ctx"]}, {"context": case["final.ctx"]})
    assert_close(model(inputs), case["expected.logits_after"], 1e-4)


def prograd_model():
    """There, words of a phrase are counted, not tokens: the rest stands before the class names."""
    case = Case("prograd")
    prompt, config = case.config["prompt"], case.config["config"]
    model = vpt.attach(case.backbone(), "coop", class_names=["a", "b"], num_tokens=1)
    words = prompt["ctx_init"].split()
    while len(model.backbone.text.words(" ".join(words), None)) > prompt["ctx_init_words"]:
        words.pop()
    rest = prompt["ctx_init"].removeprefix(" ".join(words)).strip()
    names = [f"{rest} {name}".strip() for name in case.config["classnames"]]
    model = vpt.attach(
        case.backbone(),
        "prograd",
        class_names=names,
        num_tokens=prompt["n_ctx"],
        init=" ".join(words),
        templates=[f"{' '.join(words)} {{}}."],
        weight=config["lambda_"],
        temperature=config["temperature"],
    )
    return case, model


@pytest.mark.parametrize("exact_tokens", [False, True])
def test_prograd(exact_tokens):
    case, model = prograd_model()
    model.backbone.exact_tokens = exact_tokens
    inputs, normalize = case["input.images"], torch.nn.functional.normalize
    assert_close(model.context, case["init.ctx"])
    assert_close(normalize(model.text_features(), dim=-1), case["expected.text_features"])
    assert_close(normalize(model.teacher, dim=-1), case["expected.teacher_text_features"])
    teacher = model.similarities(model.features(inputs), model.teacher)
    assert_close(teacher, case["expected.teacher_logits"])
    settings = case.config["optimiser"]
    optimizer = torch.optim.SGD(
        [model.context], **{key: settings[key] for key in ("lr", "momentum", "weight_decay")}
    )
    batch = Batch(inputs, case["input.labels"])
    for number in range(settings["steps"]):
        step = model.step(batch, CrossEntropy(model.target))
        assert_close(step.total, case["expected.step_losses"][number])
        assert_close(step.terms["teacher"], case["expected.step_losses_kl"][number])
        step.total.backward()
        if number == 0:
            assert_close(step.logits, case["expected.logits"])
            assert_close(model.context.grad, case["grad.ctx"])
        optimizer.step()
        optimizer.zero_grad()
    assert_close(model.context, case["final.ctx"], 1e-4)
    assert_close(model(inputs), case["expected.logits_after"], 1e-4)

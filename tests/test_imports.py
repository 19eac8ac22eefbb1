"""Official checkpoints as artefacts: files of exactly their layout, and hostile ones."""

import io
import os
import pickle
import re
import zipfile
from collections import OrderedDict

import numpy as np
import open_clip
import pytest
import torch
from tiny import clip, images, loader, samples, vit, vpt_cli, write_folder

import vpt
from vpt import methods, unpickle
from vpt.errors import InputError

NAMES = ["golden_retriever", "Boeing 737-800", "cat"]
SPELLED = ["golden retriever", "boeing 737-800", "cat"]
LENGTH = 24  # of the tiny CLIP's texts


def half(model):
    """A CLIP whose weights half precision holds, as OpenAI's."""
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    return model


BACKBONE = half(clip(layers=3))


def buffers(backbone, words, count):
    """`token_prefix` and `token_suffix` of texts "words name." after `count` learned vectors."""
    texts = [f"{words} {name.replace('_', ' ')}." for name in NAMES]
    ids = open_clip.SimpleTokenizer(context_length=LENGTH)(texts)
    embeddings = backbone.token_embedding.weight[ids].half()
    return {"token_prefix": embeddings[:, :1], "token_suffix": embeddings[:, 1 + count :]}


def under(prefix, tensors):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def look_alikes(prefix):
    """Keys of whole towers, a frozen teacher's prompts among them."""
    return {
        f"{prefix}.VPT": torch.ones(9, 32),
        f"{prefix}.transformer.resblocks.1.VPT_shallow": torch.ones(9, 32),
        f"{prefix}.transformer.resblocks.1.ln_1.weight": torch.ones(32).half(),
    }


def state(method, model, backbone):
    """The official state dict of a model of this package."""
    own = {name: tensor.detach().clone() for name, tensor in model.tunable_parameters().items()}
    count = model.context.shape[-2]
    if method in {"coop", "cocoop", "kgcoop"}:
        found = {"ctx": own["context"], **buffers(backbone, " ".join(["X"] * count), count)}
        if method == "cocoop":
            for theirs, ours in ((1, 0), (2, 2)):
                for part in ("weight", "bias"):
                    found[f"meta_net.linear{theirs}.{part}"] = own[f"meta_net.{ours}.{part}"]
        if method == "kgcoop":
            found["bias_vectors"] = torch.zeros(1, 16)
            found["meta_net.linear1.weight"] = torch.zeros(16, 16)
        return found
    learner = {"ctx": own["context"], **buffers(backbone, "a photo of a", count)}
    frozen = {"logit_scale": torch.tensor(4.6), "text_encoder.ln_final.weight": torch.ones(16)}
    if method == "maple":
        deep = enumerate(own["text_prompts"])
        learner |= {f"compound_prompts_text.{i}": prompts for i, prompts in deep}
        for part in ("weight", "bias"):
            learner[f"proj.{part}"] = own[f"couplings.0.{part}"].half()
            for number in range(1, len(model.couplings)):
                name = f"compound_prompt_projections.{number - 1}.{part}"
                learner[name] = own[f"couplings.{number}.{part}"]
        return under("prompt_learner.", learner) | frozen
    blocks = "_encoder.transformer.resblocks."
    for side, prompts in (("image", own["prompts"][1:]), ("text", own["text_prompts"])):
        for number, each in enumerate(prompts, 1):
            frozen[f"{side}{blocks}{number}.VPT_shallow"] = each
    frozen["image_encoder.VPT"] = own["prompts"][0]
    frozen["image_encoder.conv1.weight"] = torch.ones(2, 2).half()
    teacher = look_alikes("prompt_learner.ZS_image_encoder")
    return under("prompt_learner.", learner) | frozen | teacher


def checkpoint(path, tensors):
    """A file as Dassl's torchtools writes it, with a pickled scheduler inside."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    scheduler = {"successor": successor, "last_epoch": 5, "base_lrs": [0.1]}
    content = {
        "state_dict": OrderedDict(tensors),
        "epoch": 5,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler,
        "val_result": None,
    }
    torch.save(content, path)
    return path


def trained(method, **options):
    torch.manual_seed(0)
    model = vpt.attach(BACKBONE, method, class_names=NAMES, **options)
    with torch.no_grad():
        for parameter in model.tunable_parameters().values():
            parameter.copy_(torch.randn_like(parameter).half())
    return model.eval()


OPTIONS = {
    "coop": {"num_tokens": 5},
    "cocoop": {"init": None, "num_tokens": 3},
    "kgcoop": {"init": None, "num_tokens": 3},
    "maple": {"depth": 3},
    "promptsrc": {"text_depth": 2, "image_depth": 3},
}
METHODS = [name for name in OPTIONS if name in methods.names()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("given", [None, NAMES])
def test_an_official_file_gives_the_same_logits(method, given, tmp_path):
    model = trained(method, **OPTIONS[method])
    path = checkpoint(tmp_path / "model.pth.tar-5", state(method, model, BACKBONE))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # what makes these files hard to read
    found = vpt.import_checkpoint(path, method, BACKBONE, class_names=given)
    assert found.class_names == (given or SPELLED)
    assert not found.training
    for name, tensor in model.artifact_tensors().items():
        torch.testing.assert_close(found.artifact_tensors()[name], tensor, rtol=0, atol=0)
    torch.testing.assert_close(found(images()), model(images()))
    again = vpt.load(vpt.save(found, tmp_path / "prompt.safetensors"), BACKBONE)
    assert torch.equal(again(images()), found(images()))


def test_contexts_of_classes_and_other_positions(tmp_path):
    for number, options in enumerate(({"class_specific": True}, {"position": "front"})):
        model = trained("coop", num_tokens=4, **options)
        path = checkpoint(tmp_path / str(number), state("coop", model, BACKBONE))
        options = {key: value for key, value in options.items() if key == "position"}
        found = vpt.import_checkpoint(path, "coop", BACKBONE, **options)
        torch.testing.assert_close(found(images()), model(images()))


def without(name):
    def change(tensors):
        del tensors[name]

    return change


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("coop", without("ctx"), "no ctx in it: is it of another method than coop"),
        ("coop", without("token_suffix"), "no token_suffix in it"),
        ("coop", put("meta_net.linear1.bias", torch.ones(3)), "is nothing of coop's"),
        ("cocoop", without("meta_net.linear2.bias"), "no meta_net.linear2.bias in it"),
        ("coop", put("ctx", torch.ones(5, 7)), r"context is \(5, 7\), but coop on this backbone"),
        ("maple", without("prompt_learner.proj.bias"), "no prompt_learner.proj.bias"),
        ("maple", without("prompt_learner.compound_prompts_text.0"), "some are missing"),
        (
            "maple",
            without("prompt_learner.compound_prompt_projections.1.bias"),
            r"couplings.2.bias is missing",
        ),
        ("promptsrc", without("image_encoder.VPT"), "no image_encoder.VPT in it"),
        (
            "promptsrc",
            without("image_encoder.transformer.resblocks.1.VPT_shallow"),
            "some are missing",
        ),
        ("promptsrc", put("prompt_learner.else", torch.ones(1)), "is nothing of promptsrc's"),
        ("coop", put("token_prefix", torch.ones(3, 1, 16)), "start token is not the backbone's"),
        ("coop", put("token_suffix", torch.ones(3, 18, 16)), "not of the backbone's tokens"),
        ("coop", put("token_suffix", torch.ones(18, 16)), "wanted 3"),
    ],
)
def test_what_must_be_there_is_said_in_one_line(method, change, message, tmp_path):
    tensors = state(method, trained(method, **OPTIONS[method]), BACKBONE)
    change(tensors)
    path = checkpoint(tmp_path / "file", tensors)
    with pytest.raises(InputError, match=message) as caught:
        vpt.import_checkpoint(path, method, BACKBONE)
    assert "\n" not in str(caught.value)


def test_another_backbone_other_names_and_other_words_are_refused(tmp_path):
    path = checkpoint(tmp_path / "coop", state("coop", trained("coop", num_tokens=5), BACKBONE))
    with pytest.raises(InputError, match="start token is not the backbone's"):
        vpt.import_checkpoint(path, "coop", half(clip(seed=1)))
    with pytest.raises(InputError, match="needs a CLIP"):
        vpt.import_checkpoint(path, "coop", vit())
    for names, message in (
        (NAMES[::-1], "class 0 is 'golden retriever', but 'cat' is given"),
        (NAMES[:2], "3 classes, but 2 class names"),
    ):
        with pytest.raises(InputError, match=message):
            vpt.import_checkpoint(path, "coop", BACKBONE, class_names=names)
    model = trained("maple", **OPTIONS["maple"])
    path = checkpoint(tmp_path / "maple", state("maple", model, BACKBONE))
    with pytest.raises(InputError, match="give init=WORDS"):
        vpt.import_checkpoint(path, "maple", BACKBONE, init="a picture of one")
    with pytest.raises(InputError, match="no layout of that name: take one of coop, cocoop"):
        vpt.import_checkpoint(path, "lora", BACKBONE)


class Hostile:
    def __init__(self, call, *arguments):
        self.parts = call, arguments

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_pickle_is_run(zipped, tmp_path):
    target = tmp_path / "written"
    content = {
        "state_dict": state("coop", trained("coop", num_tokens=5), BACKBONE),
        "a": Hostile(os.system, f"touch {target}"),
        "b": Hostile(eval, f"open({str(target)!r}, 'w')"),
        "c": Hostile(pickle.loads, b"\x80\x02N."),
        "d": [Hostile(torch.load, str(target)), {Hostile(exec, "raise SystemExit")}],
    }
    path = tmp_path / "file"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    read = unpickle.read(path)
    assert not target.exists()
    assert {type(read[key]) for key in "abc"} == {unpickle.Inert}
    vpt.import_checkpoint(path, "coop", BACKBONE)
    assert not target.exists()


def test_names_with_dots_and_torchs_own_functions_are_inert():
    names = [("os", "path.join"), ("torch", "load"), ("torch.hub", "load"), ("builtins", "eval")]
    names += [("numpy", "load"), ("torch._utils", "_import_dotted_name"), ("pickle", "loads")]
    unpickler = unpickle.Unpickler(io.BytesIO())
    assert all(unpickler.find_class(*name) is unpickle.Inert for name in names)


def test_other_files_are_refused_in_one_line(tmp_path):
    script = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    text, array, folder = tmp_path / "text", tmp_path / "array", tmp_path / "zip"
    text.write_text("no checkpoint")
    torch.save([1, 2], array)
    with zipfile.ZipFile(folder, "w") as file:
        file.writestr("a/b", "c")
    empty, odd = tmp_path / "empty", tmp_path / "odd"
    torch.save({"epoch": 3}, empty)
    torch.save({"state_dict": {"ctx": "words"}}, odd)
    for path, message in {
        script: "TorchScript archive",
        text: "not a checkpoint that can be read",
        array: "its content is no dictionary",
        folder: "not a checkpoint that can be read",
        tmp_path / "none": "no such file",
        empty: "no state_dict in it",
        odd: "ctx is no tensor",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            vpt.import_checkpoint(path, "coop", BACKBONE)
        assert "\n" not in str(caught.value)


def prompt_file(path, deep=1, width=32):
    """As KMnP/vpt saves it: NumPy arrays, without projection and head."""
    content = {"shallow_prompt": np.random.default_rng(0).normal(size=(1, 4, width))}
    if deep:
        content["deep_prompt"] = np.random.default_rng(1).normal(size=(deep, 4, width))
    torch.save({k: v.astype(np.float32) for k, v in content.items()}, path)
    return path, np.concatenate(list(content.values()))


@pytest.mark.parametrize("deep", [0, 1])
def test_kmnps_prompts_get_a_solved_head(deep, tmp_path):
    path, prompts = prompt_file(tmp_path / "prompt_ep100.pth", deep)
    backbone, labels = vit(), [0, 1, 2, 2, 0, 1, 1, 0]
    start = vpt.attach(backbone, "vpt_deep", class_names=["a", "b", "c"])
    data = loader(start, samples(labels))
    model = vpt.import_checkpoint(path, "vpt", backbone, class_names=["a", "b", "c"], train=data)
    assert model.name == ("vpt_deep" if deep else "vpt_shallow")
    np.testing.assert_allclose(model.prompts.detach().numpy(), prompts, rtol=1e-6)
    inputs = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    probe = vpt.attach(backbone, "linear_probe", class_names=["a", "b", "c"])
    order = [x for x, _ in loader(start, samples(labels), train=False)]
    probe.solve(model.features(torch.cat(order)).detach(), torch.tensor(labels))
    torch.testing.assert_close(model.head.weight, probe.head.weight, rtol=1e-3, atol=1e-4)
    assert len(inputs[0]) == len(labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 12}, "projected prompts can't be restored, as the file lacks the projection"),
        ({"deep": 4}, "prompts of 5 blocks, but the backbone has 2"),
    ],
)
def test_kmnps_prompts_that_cannot_be_restored(options, message, tmp_path):
    path, _ = prompt_file(tmp_path / "prompt_ep1.pth", **options)
    with pytest.raises(InputError, match=message) as caught:
        vpt.import_checkpoint(path, "vpt", vit(), class_names=["a", "b"])
    assert "\n" not in str(caught.value)


def test_kmnps_prompts_without_images_and_other_files(tmp_path):
    path, _ = prompt_file(tmp_path / "prompt_ep1.pth")
    with pytest.raises(InputError, match="holds no head"):
        vpt.import_checkpoint(path, "vpt", vit())
    torch.save({"state_dict": {}}, path)
    with pytest.raises(InputError, match="no shallow_prompt in it"):
        vpt.import_checkpoint(path, "vpt", vit())


def test_on_the_command_line(capfd, monkeypatch, tmp_path):
    backbone = vpt.backbones.load("tiny_clip")
    names = ["cat", "dog"]
    model = vpt.attach(backbone, "coop", class_names=names, num_tokens=2)
    ids = backbone.text.tokenizer([f"X X {name}." for name in names])
    rows = backbone.text.parts.token_embedding.weight[ids].half()
    tensors = {"ctx": model.context.detach(), "token_prefix": rows[:, :1]}
    path = checkpoint(tmp_path / "model.pth.tar-5", {**tensors, "token_suffix": rows[:, 3:]})
    run = lambda *words: vpt_cli(capfd, monkeypatch, "import", *words)  # noqa: E731
    out = tmp_path / "own.safetensors"
    code, said, log = run("coop", path, "backbone.name=tiny_clip", "--out", out)
    assert code == 0 and str(out) in said and "cat, dog" in log
    assert vpt.load(out).class_names == names
    root = write_folder(tmp_path / "images")
    code, said, _ = run("coop", path, "backbone.name=tiny_clip", f"data.root={root}")
    assert code == 0 and str(tmp_path / "coop.safetensors") in said
    code, _, error = run("coop", path)
    assert code == 1 and re.search("give backbone.name=NAME", error) and error.count("\n") == 1
    path, prompts = prompt_file(tmp_path / "prompt_ep3.pth", deep=0, width=backbone.width)
    code, _, error = run("vpt", path, "backbone.name=tiny_clip")
    assert code == 1 and "give data.root=IMAGES" in error
    code, said, log = run(
        "vpt", path, "backbone.name=tiny_clip", f"data.root={root}", "data.shots=2"
    )
    assert code == 0 and "head: solved on 4 images" in log
    loaded = vpt.load(tmp_path / "vpt.safetensors")
    np.testing.assert_allclose(loaded.prompts.detach().numpy(), prompts, rtol=1e-6)
    assert loaded.metadata["split_hash"]

"""Other class names for what was learned: text methods take them, all else refuses."""

import pytest
import torch
from tiny import NAMES, clip, images, vit

import vpt
from vpt import methods
from vpt.errors import InputError

OTHERS = ["an ox", "tabby cat", "blue_whale", "bird of paradise"]


def saved(path, backbone, method, **options):
    torch.manual_seed(0)
    model = vpt.attach(backbone, method, class_names=NAMES, **options)
    with torch.no_grad():
        for parameter in model.tunable_parameters().values():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model, vpt.save(model, path / "prompt.safetensors", decision={"temperature": 2.0})


@pytest.mark.parametrize("method", methods.names())
@pytest.mark.parametrize("multilabel", [False, True])
def test_on_a_clip_they_are_taken_or_refused(method, multilabel, tmp_path):
    backbone = clip()
    model, path = saved(tmp_path, backbone, method, multilabel=multilabel)
    if not model.takes_names:
        with pytest.raises(InputError, match=f"what {method} learned belongs to its own") as caught:
            vpt.load(path, backbone, class_names=OTHERS)
        assert "\n" not in str(caught.value)
        return
    again = vpt.load(path, backbone, class_names=OTHERS)
    assert again.class_names == again.metadata["class_names"] == OTHERS
    assert "decision" not in again.metadata
    expected = vpt.attach(
        backbone, method, class_names=OTHERS, multilabel=multilabel, **model.options.model_dump()
    )
    expected.load_state_dict(model.tunable_parameters(), strict=False)
    logits = again(images())
    assert torch.equal(logits, expected.eval()(images()))
    torch.testing.assert_close(again.fold()(images()), logits)
    # a class's logit does not depend on the others
    torch.testing.assert_close(logits[:, 1], model.eval()(images())[:, 0])
    again = vpt.load(vpt.save(again, tmp_path / "again.safetensors"), backbone)
    assert torch.equal(again(images()), logits)


def test_methods_with_text_towers_take_them():
    taken = {name for name in methods.names() if methods.find(name).takes_names}
    assert taken >= {"coop", "cocoop", "zero_shot"}


@pytest.mark.parametrize(
    ("make", "method", "options"),
    [(clip, "coop", {"class_specific": True}), (vit, "pixel_prompts", {}), (vit, "vpt_deep", {})],
)
def test_what_belongs_to_its_classes_refuses(make, method, options, tmp_path):
    backbone = make()
    _, path = saved(tmp_path, backbone, method, **options)
    for names in (OTHERS, NAMES[::-1]):
        with pytest.raises(InputError, match="belongs to its own classes: drop class_names"):
            vpt.load(path, backbone, class_names=names)
    with pytest.raises(InputError, match="at least two classes"):
        vpt.load(path, backbone, class_names=[])


def test_class_embeddings_of_cocoop_need_features():
    model = vpt.attach(clip(), "cocoop", class_names=NAMES)
    for form in (model, model.fold()):
        with pytest.raises(InputError, match=r"need image features: text_features\(features\)"):
            form.text_features()
        assert form.text_features(form.features(images())).shape == (3, len(NAMES), 16)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["cat", "cat "], "twice, cat"),
        (["\u00e9", "e\u0301"], "twice"),
        (["a", " "], "' ' is empty"),
        ((name for name in "ab"), "is a generator: give a list"),
    ],
)
def test_names_that_look_alike_or_are_none_are_refused(names, match):
    with pytest.raises(InputError, match=match):
        vpt.attach(vit(), "linear_probe", class_names=names)

"""open_clip models of all kinds: texts, zero-shot, contexts."""

import open_clip
import pytest
import torch
from families import MODELS, build, clip, is_clip, siglip_tokens
from open_clip.model import CustomTextCLIP
from tiny import NAMES, images

import vpt
from vpt import backbones
from vpt.backbones.text import TextTower, find_text_tower
from vpt.errors import InputError

CLIPS = [name for name in MODELS if is_clip(MODELS[name]())]
TAKE_CONTEXT = [name for name in CLIPS if find_text_tower(MODELS[name]()) is not TextTower]


def tokenizer_for(name):
    return siglip_tokens if name == "siglip_clip" else None


@pytest.mark.parametrize("name", CLIPS)
def test_texts_are_encoded_as_the_model_does(name):
    model = build(name)
    texts = ["a photo of a cat.", "an ox"]
    ids = (tokenizer_for(name) or open_clip.SimpleTokenizer(context_length=40))(texts)
    features = backbones.adapt(model).encode_texts(texts, tokenizer_for(name))
    torch.testing.assert_close(features, model.encode_text(ids, normalize=False))


@pytest.mark.parametrize("name", CLIPS)
def test_zero_shot_is_the_models_own_classifier(name):
    model = build(name)
    options = {"templates": ["a {}."]}
    prompted = vpt.attach(
        model, "zero_shot", class_names=NAMES, tokenizer=tokenizer_for(name), **options
    )
    texts = [f"a {name.replace('_', ' ')}." for name in NAMES]
    ids = (tokenizer_for(name) or open_clip.SimpleTokenizer(context_length=40))(texts)
    expected = model.logit_scale.exp() * (
        model.encode_image(images(), normalize=True) @ model.encode_text(ids, normalize=True).T
    )
    if model.logit_bias is not None:
        expected = expected + model.logit_bias
    torch.testing.assert_close(prompted(images()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TAKE_CONTEXT)
def test_a_context_is_learned_where_the_text_tower_is_clips(name):
    options = {"class_names": NAMES, "tokenizer": tokenizer_for(name)}
    model = vpt.attach(build(name), "coop", num_tokens=2, **options)
    model.loss(images(), torch.tensor([0, 1, 2]))[0].backward()
    assert model.context.grad.abs().min() > 0
    shared = model.text_features()
    model.backbone.exact_tokens = True
    torch.testing.assert_close(model.text_features(), shared, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"init": "a photo"}])
def test_other_text_towers_take_no_context(options):
    """Such as CLIPA's, without a mask and with a begin mark."""
    model = clip(CustomTextCLIP, text={"no_causal_mask": True, "pool_type": "last"})
    assert find_text_tower(model) is TextTower
    with pytest.raises(InputError, match="takes no learned context: supported are") as caught:
        vpt.attach(model, "coop", class_names=NAMES, **options)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_that_is_not_clips_needs_a_tokenizer():
    with pytest.raises(InputError, match=r"32000 token ids.*give tokenizer="):
        vpt.attach(build("siglip_clip"), "zero_shot", class_names=NAMES)

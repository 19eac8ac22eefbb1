"""open_clip models of all kinds: texts, zero-shot, contexts, and prompts before `ln_pre`."""

import open_clip
import pytest
import torch
from families import MODELS, build, is_clip
from golden_case import Case, assert_close
from tiny import NAMES, images

import vpt
from vpt import backbones
from vpt.errors import InputError

CLIPS = [name for name in MODELS if is_clip(MODELS[name]())]
READ_AT_EOT = [name for name in CLIPS if name not in ("coca", "siglip_clip")]


def tokenize(texts):
    """Ids for towers of any vocabulary."""
    generator = torch.Generator().manual_seed(len(texts[0]))
    return torch.randint(1, 32000, (len(texts), 40), generator=generator)


def tokenizer_for(name):
    return tokenize if name == "siglip_clip" else None


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


@pytest.mark.parametrize("name", READ_AT_EOT)
def test_a_context_is_learned_where_the_text_tower_is_clips(name):
    model = vpt.attach(build(name), "coop", class_names=NAMES, num_tokens=2)
    model.loss(images(), torch.tensor([0, 1, 2]))[0].backward()
    assert model.context.grad.abs().min() > 0
    shared = model.text_features()
    model.backbone.exact_tokens = True
    torch.testing.assert_close(model.text_features(), shared, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"init": "a photo"}])
@pytest.mark.parametrize("name", sorted(set(CLIPS) - set(READ_AT_EOT)))
def test_other_text_towers_take_no_context(name, options):
    with pytest.raises(InputError, match="takes no learned context: supported are") as caught:
        vpt.attach(build(name), "coop", class_names=NAMES, tokenizer=tokenize, **options)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_that_is_not_clips_needs_a_tokenizer():
    with pytest.raises(InputError, match=r"32000 token ids.*give tokenizer="):
        vpt.attach(build("siglip_clip"), "zero_shot", class_names=NAMES)


@pytest.mark.parametrize("exact_tokens", [False, True])
def test_prompts_before_ln_pre(exact_tokens):
    """VPT on CLIP as MaPLe's repository has it: before `ln_pre`, after the last patch."""
    case = Case("vpt_clip")
    backbone = backbones.adapt(case.backbone())
    backbone.exact_tokens = exact_tokens
    context = {name: tensor.requires_grad_() for name, tensor in case.under("init.").items()}
    first, *deep = (context[name] for name in sorted(context, key=lambda name: (len(name), name)))
    prompts = [backbone.image_tower.ln_pre(first), *deep]
    features = backbone(case["input.images"], prompts, range(len(prompts)), "append")
    normalized = torch.nn.functional.normalize(features, dim=-1)
    assert_close(normalized, case["expected.image_features"])
    logits = backbone.similarity(features, case["expected.text_features"])
    assert_close(logits, case["expected.logits"])
    torch.nn.functional.cross_entropy(logits, case["input.labels"]).backward()
    for name, tensor in context.items():
        assert_close(tensor.grad, case[f"grad.{name}"])

"""Text towers: deep prompts on both paths against hooks in the model, and a family of one's own."""

import functools
from pathlib import Path

import families
import open_clip
import pytest
import torch
from tiny import NAMES, images
from torch.nn import functional as F

import vpt
from vpt import backbones
from vpt.backbones import texts
from vpt.backbones.text import TextTower, find_text_tower, text_families
from vpt.errors import InputError

TEXTS = ["X X X cat.", "X X X bird of paradise.", "X X X a xylophone.", "X X X ox."]
COUNT, DEPTH = 3, 4


@functools.cache
def tower():
    model = families.clip(text={"layers": DEPTH, "ls_init_value": 0.5})
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return backbones.adapt(model.double()).text


def learned(*shape):
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def layout(position="end"):
    ids = tower().tokenize(TEXTS)
    names = [len(tower().words(text.removeprefix("X X X ").rstrip("."))) for text in TEXTS]
    return ids, tower().order(COUNT, names, ids.shape[1], position)


def plain(context, prompts, position="end"):
    ids, order = layout(position)
    x = tower().put(tower().embed(ids), context)
    x = x.gather(1, order[..., None].expand_as(x))
    return tower().run(x, ids, prompts, tower().places(order, COUNT))


def outcome(output, *inputs):
    return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]


def assert_equal(one, other):
    for a, b in zip(one, other, strict=True):
        atol = 1e-9 * b.abs().max().item()
        assert atol > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=atol)


@pytest.mark.parametrize("shared_words", [COUNT, COUNT - 1])
@pytest.mark.parametrize("depth", range(1, DEPTH + 1))
def test_a_shared_prefix_with_deep_prompts_is_the_plain_path(depth, shared_words):
    """With `shared_words` above the context's length, words after it are shared too."""
    count = 2
    ids, _ = layout()
    suffixes = tower().pack(ids, shared_words)
    contexts, prompts = learned(2, count, 16), learned(depth - 1, count, 16)
    shared = tower().run_shared(
        tower().put(tower().embed(ids[:1, : suffixes.prefix_length]), contexts), suffixes, prompts
    )
    places = torch.arange(1, 1 + count).expand(len(ids), -1)
    runs = [
        tower().run(tower().put(tower().embed(ids), context), ids, prompts, places)
        for context in contexts
    ]
    inputs = [contexts, prompts] if depth > 1 else [contexts]
    assert_equal(outcome(shared, *inputs), outcome(torch.stack(runs), *inputs))


def hooked(context, prompts, where):
    """The model's own forward, whose text blocks find the context overwritten."""
    model, ids = tower().parts, tower().tokenize(TEXTS)
    padded = F.pad(ids, (0, model.context_length - ids.shape[1]))

    def overwrite(prompt):
        def before(module, arguments):
            x = arguments[0].clone()
            for row, places in enumerate(where):
                x[row, places] = prompt[row] if prompt.dim() == 3 else prompt
            return (x, *arguments[1:])

        return before

    blocks = model.transformer.resblocks
    start = context + model.positional_embedding[torch.tensor(where)]
    hooks = [
        block.register_forward_pre_hook(overwrite(prompt))
        for block, prompt in zip(blocks, [start, *prompts], strict=False)
    ]
    try:
        return model.encode_text(padded)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("specific", [False, True])
def test_deep_prompts_overwrite_the_context(specific):
    context = learned(len(TEXTS), COUNT, 16) if specific else learned(COUNT, 16)
    prompts = learned(2, COUNT, 16)
    expected = hooked(context, prompts, [[1, 2, 3]] * len(TEXTS))
    found = plain(context, prompts)
    assert_equal(outcome(found, context, prompts), outcome(expected, context, prompts))


@pytest.mark.parametrize(
    ("position", "texts", "where"),
    [
        ("front", ["cat X X X.", "bird of paradise X X X."], [[2, 3, 4], [4, 5, 6]]),
        ("middle", ["X cat X X.", "X bird of paradise X X."], [[1, 3, 4], [1, 5, 6]]),
    ],
)
def test_deep_prompts_follow_the_context(position, texts, where, monkeypatch):
    context, prompts = learned(COUNT, 16), learned(DEPTH - 1, COUNT, 16)
    found = plain(context, prompts, position)[:2]
    monkeypatch.setattr(f"{__name__}.TEXTS", texts)
    expected = hooked(context, prompts, where)
    assert_equal(outcome(found, context, prompts), outcome(expected, context, prompts))


def test_a_prompt_that_is_overwritten_needs_no_output():
    """Its query, output projection and MLP are not computed."""
    ids, _ = layout()
    suffixes = tower().pack(ids, COUNT)
    rows = []
    hooks = [
        block.mlp.register_forward_hook(lambda *a: rows.append(a[2].shape[1]))
        for block in tower().parts.transformer.resblocks
    ]
    words = tower().embed(ids[:1, : suffixes.prefix_length])
    tower().run_shared(tower().put(words, learned(COUNT, 16)), suffixes, learned(2, COUNT, 16))
    for hook in hooks:
        hook.remove()
    full = len(suffixes.positions)
    assert rows == [full - COUNT, full - COUNT, full, len(TEXTS)]


class Bag(TextTower):
    """Words without order or marks: the mean of their embeddings, projected."""

    family = "bags of words"
    start = 0

    def __init__(self, model):
        super().__init__(model)
        self.width, self.num_layers = model.token_embedding.embedding_dim, 1

    @staticmethod
    def fits(model):
        return False

    def tokenize(self, texts, tokenizer=None):
        ids = super().tokenize(texts, tokenizer)[:, 1:]
        return torch.where(ids < 49406, ids, 0)[:, :20]

    def words(self, text, tokenizer=None):
        ids = self.tokenize([text], tokenizer)[0]
        return ids[ids > 0]

    def embed(self, ids):
        return self.parts.token_embedding(ids)

    def run(self, embeddings, ids, prompts=None, places=None):
        kept = (ids > 0).to(embeddings.dtype)[..., None]
        return ((embeddings * kept).sum(1) / kept.sum(1)) @ self.parts.text_projection


@pytest.mark.parametrize("position", ["end", "front"])
def test_a_family_of_ones_own_learns_a_context(position, tmp_path):
    model = families.build("clip")
    backbone = backbones.adapt(model, text_tower=Bag)
    options = {"class_names": NAMES, "position": position}
    prompted = vpt.attach(backbone, "coop", init="a photo of a", **options)
    assert isinstance(prompted.backbone.text, Bag)
    ids = open_clip.SimpleTokenizer()("a photo of a tabby cat.")[0]
    words = ids[1 : int(ids.argmax())]
    expected = model.token_embedding(words).mean(0) @ model.text_projection
    torch.testing.assert_close(prompted.text_features()[0], expected)
    prompted.loss(images(), torch.arange(3))[0].backward()
    assert prompted.context.grad.abs().min() > 0
    vpt.save(prompted, tmp_path / "bag.safetensors")
    again = vpt.load(tmp_path / "bag.safetensors", backbone)
    assert torch.equal(again(images()), prompted.eval()(images()))
    assert torch.equal(again.fold()(images()), again(images()))


def test_families_are_found_by_file():
    modules = {family.__module__.rpartition(".")[2] for family in text_families()}
    assert modules == {file.stem for file in Path(texts.__file__).parent.glob("[!_]*.py")}
    assert "causal_eot" in modules
    assert find_text_tower(families.clip()).__module__ == "vpt.backbones.texts.causal_eot"


def test_each_model_has_one_family():
    for name in ("clip", "clip_custom_text", "coca", "siglip_clip"):
        model = families.build(name)
        assert sum(family.fits(model) for family in text_families()) <= 1


def test_a_model_without_text_takes_no_text_tower():
    with pytest.raises(InputError, match=r"text_tower=Bag: .* has no text tower"):
        backbones.adapt(families.build("vit"), text_tower=Bag)


def test_ones_own_text_tower_keeps_the_tokenizer_of_the_name():
    backbone = backbones.adapt(families.build("siglip_clip"))
    assert backbone.tokenizer is None
    backbone.tokenizer = len  # any function
    assert backbones.adapt(backbone, text_tower=TextTower).tokenizer is len

"""Text towers of every kind, as open_clip builds them, each with a tokenizer of its own."""

import functools
import json
import tempfile
from pathlib import Path

import families
import open_clip
import pytest
import tokenizers
import torch
import transformers
from tiny import NAMES, images, perturb, solved
from tokenizers import decoders, pre_tokenizers, processors
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vpt
from vpt import backbones, methods
from vpt.errors import InputError

WORDS = "a photo of"
LENGTH = 40
VOCABULARY = sorted({"a", "photo", "of", "the", "x", *" ".join(NAMES).replace("_", " ").split()})
LETTERS = "abcdefghijklmnopqrstuvwxyzX."
CLASSES = [*NAMES, "a xylophone"]  # which is no word of the vocabularies
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def pieces(end, pad, spaces):
    """A tokenizer of word pieces, of which `spaces` says which begin with a space."""
    marks = ["<pad>", "</s>", "<unk>"] if pad == "<pad>" else ["<unk>", "</s>"]
    words = [piece for word in VOCABULARY for piece in (word, "▁" + word)]
    entries = [(mark, 0.0) for mark in marks] + [(word, -1.0 - len(word)) for word in words]
    entries += [(letter, -20.0) for letter in [*LETTERS, "▁"] if letter not in words]
    model = tokenizers.models.Unigram(entries, unk_id=marks.index("<unk>"))
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=spaces)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=spaces)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, marks.index(end))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=pad, unk_token="<unk>"
    )


def siglip(folder):
    """T5's pieces: the first word begins with a space too, the end is the padding."""
    pieces("</s>", "</s>", "always").save_pretrained(folder)
    return families.SIGLIP_TEXT | {"tokenizer_kwargs": {"clean": "canonicalize"}}


def siglip2(folder):
    """Gemma's: the first word has no space before it."""
    pieces("</s>", "<pad>", "never").save_pretrained(folder)
    return families.SIGLIP_TEXT | {"tokenizer_kwargs": {"clean": "canonicalize"}}


def bert(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *VOCABULARY]
    words += [letter for letter in LETTERS if letter not in words]
    words += [f"##{letter}" for letter in LETTERS]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(vocab_size=len(words), intermediate_size=32, **SIZES)
    config.save_pretrained(folder)
    return {"hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler"}


def bert_pooled(folder):
    return bert(folder) | {"hf_proj_type": "linear", "hf_pooler_type": "cls_pooler"}


def roberta(folder):
    """Bytes and a few merges: a name's pieces depend on the space before it."""
    marks = ["<s>", "<pad>", "</s>", "<unk>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("Ġ", "X"), ("d", "o"), ("do", "g"), ("Ġ", "dog"), ("Ġ", "t")]
    words = [*marks, *letters, *("".join(merge) for merge in merges)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    config = transformers.RobertaConfig(
        vocab_size=len(words), pad_token_id=1, intermediate_size=32, **SIZES
    )
    config.save_pretrained(folder)
    return {"hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler", "context_length": 50}


FOLDERS = {f.__name__: f for f in (siglip, siglip2, bert, bert_pooled, roberta)}
TOWERS = ["clip", "clip_custom_text", "coca", *FOLDERS]
CAUSAL = {"clip", "clip_custom_text"}


@functools.cache
def load(kind, dtype=torch.float64):
    """The backbone called `kind`, from the files of a model's page where it is of FOLDERS."""
    if kind not in FOLDERS:
        return backbones.adapt(families.build(kind).to(dtype))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = {"context_length": LENGTH, "width": 16, "heads": 2, "layers": 3}
        text |= {"hf_tokenizer_name": "of/the-hub"} | FOLDERS[kind](folder)
        config = {"embed_dim": 16, "custom_text": True, "vision_cfg": families.VISION}
        local = text
        if (folder / "config.json").exists():
            local = text | {"hf_model_name": str(folder), "hf_model_pretrained": False}
            text |= {"hf_model_name": "of/the-hub"}
        else:
            config |= {"init_logit_bias": -1.0}
        (folder / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": config | {"text_cfg": text}})
        )
        torch.manual_seed(0)
        model = open_clip.create_model(
            f"local-dir:{folder}", text_cfg=local, load_weights=False, pretrained_text=False
        )
        torch.save(perturb(model).state_dict(), folder / "open_clip_pytorch_model.bin")
        backbone = backbones.load("siglip_b16", str(folder))
        backbone.tokenizer([""])  # read while the folder is there
    backbone.model.to(dtype)
    return backbone


def own(kind, texts):
    """The model's own features of texts at their full length."""
    with torch.no_grad():
        return load(kind).model.encode_text(ids_of(kind, texts), normalize=False)


def ids_of(kind, texts):
    tokenizer = load(kind).tokenizer
    if kind == "coca":
        tokenizer = open_clip.SimpleTokenizer(context_length=40)
    return tokenizer([text.replace("_", " ") for text in texts])


def attach(kind, method="coop", dtype=torch.float64, **options):
    torch.manual_seed(0)
    return vpt.attach(load(kind, dtype), method, class_names=CLASSES, **options)


def close(one, other, tolerance=1e-9):
    atol = tolerance * other.abs().max().item()
    assert atol > 0
    torch.testing.assert_close(one, other, rtol=tolerance, atol=atol)


def places(kind, position, count):
    """Positions of the context, by hand: how many tokens the names have, and where words start."""
    start = 0 if "siglip" in kind else 1
    tower = load(kind).text
    names = [len(tower.words(f"{WORDS} {n.replace('_', ' ')}")) - count for n in CLASSES]
    before = {"end": count, "middle": count // 2, "front": 0}[position]
    return [
        [start + place + (length if place >= before else 0) for place in range(count)]
        for length in names
    ]


@pytest.mark.parametrize("kind", TOWERS)
def test_whole_texts_are_encoded_as_the_model_does(kind):
    texts = ["a photo of an xylophone.", "a dog", "of X"]
    with torch.no_grad():
        close(load(kind).encode_texts(texts), own(kind, texts))


@pytest.mark.parametrize("kind", TOWERS)
def test_words_in_the_contexts_place_are_the_hand_written_text(kind):
    model = attach(kind, init=WORDS)
    close(model.text_features().detach(), own(kind, [f"{WORDS} {name}." for name in CLASSES]))
    word = model.backbone.text.placeholder
    model = attach(kind, num_tokens=3)
    with torch.no_grad():
        model.context.copy_(model.backbone.text.embed(model.tokens[0, model.places[0]]))
    texts = [f"{word} {word} {word} {name}." for name in CLASSES]
    close(model.text_features().detach(), own(kind, texts))


@pytest.mark.parametrize("position", ["middle", "front"])
@pytest.mark.parametrize("kind", TOWERS)
def test_a_name_keeps_its_own_tokens_wherever_it_stands(kind, position):
    model = attach(kind, init=WORDS, position=position)
    ids = ids_of(kind, [f"{WORDS} {name}." for name in CLASSES])
    count, moved = len(model.context), []
    for row, where in zip(ids.tolist(), places(kind, position, count), strict=True):
        start = 0 if "siglip" in kind else 1
        context, rest = row[start : start + count], row[start + count :]
        text = row[:start]
        while context or rest:
            text.append(context.pop(0) if context and len(text) in where else rest.pop(0))
        moved.append(text)
    with torch.no_grad():
        if kind in CAUSAL:  # the tower looks for the end by the highest id, which has moved not
            assert (torch.tensor(moved).argmax(1) == ids.argmax(1)).all()
        expected = load(kind).model.encode_text(torch.tensor(moved), normalize=False)
    close(model.text_features().detach(), expected)


@pytest.mark.parametrize(
    ("kind", "text", "tokens"),
    [
        ("siglip", "tabby cat", ["▁tabby", "▁cat"]),
        ("siglip2", "tabby cat", ["tabby", "▁cat"]),
        ("siglip2", "of tabby cat", ["of", "▁tabby", "▁cat"]),
        ("bert", "Tabby ox", ["tabby", "[UNK]"]),
        ("roberta", "dog", ["dog"]),
        ("roberta", "X dog", ["X", "Ġdog"]),
    ],
)
def test_words_are_those_of_the_text_without_marks(kind, text, tokens):
    backbone = load(kind)
    ids = backbone.text.words(text).tolist()
    tokenizer = backbones._tokenizer(backbone.tokenizer.args[0]).tokenizer
    if "[UNK]" in tokens:
        tokens = tokenizer.tokenize(text)
    assert tokenizer.convert_ids_to_tokens(ids) == tokens


@pytest.mark.parametrize("kind", TOWERS)
def test_texts_are_cut_only_where_that_is_exact(kind):
    texts = ["a photo of a cat.", "a dog."]
    ids, full = load(kind).text.tokenize(texts), ids_of(kind, texts)
    after = {"siglip": None, "siglip2": None, "coca": 1}.get(kind, 0)
    pad = int(full[0, -1])
    expected = full.shape[1] if after is None else int((full != pad).sum(1).max()) + after
    assert torch.equal(ids, full[:, :expected])


@pytest.mark.parametrize("kind", TOWERS)
def test_a_name_is_never_cut(kind):
    """The context takes the place of padding, and refuses where there is none left."""
    tower, length = load(kind).text, ids_of(kind, [""]).shape[1]
    words = [len(tower.words(text)) for text in (WORDS, f"{WORDS} {CLASSES[-1]}.")]
    most = length - 2 - tower.start - (words[1] - words[0])
    model = attach(kind, num_tokens=most)
    assert model.tokens.shape[1] in {length, length - 1}
    with pytest.raises(InputError, match=f"a xylophone.' does not fit .* {length} tokens"):
        attach(kind, num_tokens=most + 1)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("specific", [False, True])
@pytest.mark.parametrize("kind", sorted(set(TOWERS) - CAUSAL))
def test_deep_prompts_overwrite_the_context_in_the_models_own_forward(kind, specific, depth):
    backbone, model = load(kind), attach(kind, init=WORDS, position="middle")
    count = len(model.context)
    prompts = torch.randn(depth, len(CLASSES), count, 16, dtype=torch.float64)
    prompts = prompts if specific else prompts[:, :1].expand(-1, len(CLASSES), -1, -1)
    with torch.no_grad():
        embeddings = model.prompt_embeddings(prompts[0])
        found = backbone.text.run(embeddings, model.tokens, prompts[1:], model.places)
    parts = backbone.text.parts
    bert = hasattr(parts.transformer, "encoder")
    table = parts.transformer.embeddings.word_embeddings if bert else parts.token_embedding
    blocks = parts.transformer.encoder.layer if bert else parts.transformer.resblocks

    def overwrite(x, prompt):
        x = x.clone()
        for row, where in enumerate(places(kind, "middle", count)):
            x[row, where] = prompt[row]
        return x

    hooks = [table.register_forward_hook(lambda *a: overwrite(a[2], prompts[0]))]
    for block, prompt in zip(blocks[1:], prompts[1:], strict=False):
        before = functools.partial(lambda p, m, a: (overwrite(a[0], p), *a[1:]), prompt)
        hooks.append(block.register_forward_pre_hook(before))
    try:
        ids = model.tokens.gather(1, model.order)
        if kind == "coca":
            ids = F.pad(ids, (0, 40 - ids.shape[1]))
        with torch.no_grad():
            expected = backbone.model.encode_text(ids, normalize=False)
    finally:
        for hook in hooks:
            hook.remove()
    close(found, expected)


def reads_text(method):
    return getattr(methods.find(method), "reads_text", False)


@pytest.mark.parametrize("method", [name for name in methods.names() if reads_text(name)])
@pytest.mark.parametrize("kind", ["coca", "siglip", "siglip2", "bert", "roberta"])
def test_every_method_trains_or_refuses_in_one_line(kind, method, tmp_path):
    try:
        model = attach(kind, method, torch.float32)
    except InputError as error:
        assert method in {"mmrl", "mmrlpp", "clip_lora", "clip_svd"}, error
        assert "\n" not in str(error)
        assert "take " in str(error)
        return
    loader = DataLoader(TensorDataset(images(4), torch.arange(4)), 2)
    before = {name: p.detach().clone() for name, p in model.tunable_parameters().items()}
    vpt.fit(model, loader, config={"epochs": 2, "lr": 1e-2, "schedule": "constant"})
    moved = [name for name, p in model.tunable_parameters().items() if not p.equal(before[name])]
    assert solved(method) or moved == list(before)
    model.eval()
    expected = model(images()).detach()
    close(model.fold()(images()).detach(), expected, 1e-4)
    path = vpt.save(model, tmp_path / "prompt.safetensors")
    close(vpt.load(path, load(kind, torch.float32))(images()).detach(), expected, 1e-6)

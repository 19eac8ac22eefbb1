"""The methods around VPT, each against its paper's formula computed directly."""

import copy
import sys

import pytest
import tiny
import torch
from families import MODELS
from hooks import epoch
from timm.models.vision_transformer import ResPostBlock
from tiny import clip, images, pairs, perturb, solved, vit
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vpt
from vpt.errors import InputError
from vpt.losses.cross_entropy import CrossEntropy
from vpt.methods.base import Batch

LABELS = torch.tensor([0, 1, 2, 2, 0, 1, 1])


def attach(backbone, method, **options):
    return tiny.attach(backbone, method, **options).eval()


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def loader():
    return DataLoader(TensorDataset(images(7), LABELS), 3)


def start(model, batches):
    """The first thing that `fit` does."""
    data = torch.cat([inputs for inputs, _ in batches]), LABELS
    named = [Batch(*batch) for batch in batches]
    model.before_epoch(
        epoch(model, lambda: model.features(data[0]).detach(), data[1], batches=named)
    )


KINDS = {"vit": vit, "clip": clip}
BACKBONES = pytest.mark.parametrize("make", KINDS.values())


@pytest.mark.parametrize(
    ("method", "kind"), [pair for pair in pairs(*KINDS) if not solved(pair[0])]
)
def test_fit_lowers_the_loss(method, kind):
    model = attach(KINDS[kind](), method)
    own_weights = any(name.startswith("backbone.") for name in model.tunable_parameters())
    config = {"epochs": 6, "lr": 1e-3 if own_weights else 1e-2, "schedule": "constant"}
    before = copy.deepcopy(model.artifact_tensors())
    history = vpt.fit(model, loader(), config=config)
    assert history[-1]["loss"] < history[0]["loss"]
    assert any(not torch.equal(before[n], t) for n, t in model.tunable_parameters().items())


@pytest.mark.parametrize(
    "method", ["gated_prompts", "self_prompts", "kv_prompts", "lora", "bias_tuning", "partial_k"]
)
@pytest.mark.parametrize("family", ["beit", "dinov3", "swin", "swinv2", "clip_custom_text"])
def test_on_other_families_all_that_counts_as_tunable_trains(family, method):
    backbone = perturb(MODELS[family]())  # SwinV2 starts with norms of weight 0
    if method == "kv_prompts" and "swin" in family:
        with pytest.raises(InputError, match="kv_prompts needs blocks of one width"):
            attach(backbone, method)
        return
    with torch.no_grad():  # whatever the caller does
        model = attach(backbone, method)
    before = {name: p.detach().clone() for name, p in model.tunable_parameters().items()}
    vpt.fit(model, loader(), config={"epochs": 3, "lr": 1e-2, "schedule": "constant"})
    still = [n for n, p in model.tunable_parameters().items() if torch.equal(p, before[n])]
    assert not still
    close(model.eval().fold()(images()), model(images()), 1e-4)


@pytest.mark.parametrize("method", ["full_finetune", "bias_tuning", "partial_k", "lora"])
def test_what_trains_the_backbone_is_loaded_on_the_pretrained_one(tmp_path, method):
    backbone = vit()
    model = attach(backbone, method)
    vpt.fit(model, loader(), config={"epochs": 2, "lr": 1e-2})
    vpt.save(model, tmp_path / "prompt.safetensors")
    again = vpt.load(tmp_path / "prompt.safetensors", backbone)
    assert torch.equal(again(images()), model.eval()(images()))


def test_more_clusters_than_patches_are_refused():
    model = attach(vit(), "self_prompts", num_tokens=200, pooling="kmeans")
    with pytest.raises(InputError, match="num_tokens=200: more than the patches"):
        vpt.fit(model, loader(), config={"epochs": 1})


class TestGatedPrompts:
    def test_the_formula(self):
        backbone = vit(depth=3)
        model = attach(backbone, "gated_prompts", num_tokens=4)
        with torch.no_grad():
            model.gates.copy_(torch.tensor([0.3, -1.0]))
        inputs = images()
        x = backbone._pos_embed(backbone.patch_embed(inputs))
        prompts = model.prompts.expand(3, -1, -1)
        for block, logit in zip(backbone.blocks, [0.3, -1.0, 9.0], strict=True):
            g = 1 / (1 + torch.tensor(-logit).exp())
            out = block(torch.cat([prompts, x], 1))
            prompts, x = g * out[:, :4] + (1 - g) * prompts, out[:, 4:]
        close(model.features(inputs), backbone.norm(x)[:, 0])

    @BACKBONES
    def test_open_gates_are_vpt_shallow_and_closed_ones_repeat_the_prompts(self, make):
        backbone = make()
        shallow = attach(backbone, "vpt_shallow")
        opened = attach(backbone, "gated_prompts", gate_logit=50)
        opened.load_state_dict(shallow.artifact_tensors(), strict=False)
        close(opened(images()), shallow(images()))
        closed = attach(backbone, "gated_prompts", gate_logit=-50)
        deep = attach(backbone, "vpt_deep")
        with torch.no_grad():
            deep.prompts.copy_(closed.prompts.expand_as(deep.prompts))
        close(closed.features(images()), deep.features(images()))

    def test_dropout_and_projection_hold_as_in_vpt_shallow(self):
        model = attach(vit(), "gated_prompts", gate_logit=50, dropout=0.5, project=6)
        shallow = attach(vit(), "vpt_shallow", dropout=0.5, project=6)
        shallow.load_state_dict(model.artifact_tensors(), strict=False)
        outputs = []
        for each in (model, shallow):
            torch.manual_seed(3)
            outputs.append(each.train().features(images()))
        close(*outputs)


class TestFourierPrompts:
    def test_the_real_part_of_a_discrete_transform_over_tokens_and_width(self):
        model = attach(vit(), "fourier_prompts", num_tokens=5, fourier=0.6)
        raw = model.prompts.detach().to(torch.complex64)

        def matrix(n):
            k = torch.arange(n)
            return torch.exp(-2j * torch.pi * k[:, None] * k / n)

        expected = torch.einsum("pq,lqd,de->lpe", matrix(3), raw[:, :3], matrix(32)).real
        made = model.layer_prompts()
        close(made[:, :3], expected, 1e-4)
        assert torch.equal(made[:, 3:], model.prompts[:, 3:])

    @BACKBONES
    def test_without_a_share_it_is_vpt_deep(self, make):
        model, deep = attach(make(), "fourier_prompts", fourier=0), attach(make(), "vpt_deep")
        assert torch.equal(model(images()), deep(images()))
        transformed = attach(make(), "fourier_prompts", fourier=1)
        assert (transformed.features(images()) - deep.features(images())).abs().max() > 1e-3


class TestKVPrompts:
    @BACKBONES
    def test_keys_and_values_of_tokens_act_as_these_tokens(self, make):
        backbone = make()
        both = attach(backbone, "vpt_deep", num_tokens=7)
        model = attach(backbone, "kv_prompts", num_tokens=4, num_rows=3)
        with torch.no_grad():
            model.prompts.copy_(both.prompts[:, :4])
            for index, extra in enumerate(both.prompts[:, 4:]):
                model.kv_prompts[index] = torch.stack(model.backbone.rows(index, extra)[:2])[:, 0]
            model.head.load_state_dict(both.head.state_dict())
        both.backbone.exact_tokens = True
        close(model(images()), both(images()))
        model.backbone.exact_tokens = True
        close(model(images()), both(images()))
        close(model.fold()(images()), both(images()))

    def test_pruning_takes_the_least_important_tokens_and_segments(self):
        options = {"num_tokens": 5, "segments": 4, "prune_tokens": 0.4, "prune_segments": 0.25}
        model = attach(vit(), "kv_prompts", **options)
        tokens, segments = torch.zeros(2, 5), torch.zeros(2, 5, 4)
        for inputs, labels in loader():
            (gradient,) = torch.autograd.grad(model.loss(inputs, labels)[0], model.prompts)
            # the chain rule: a mask's gradient is the sum of its prompt's gradient times the prompt
            product = (gradient * model.prompts).detach().unflatten(-1, (4, 8)).sum(-1)
            tokens += product.sum(-1).abs()
            segments += product.abs()
        expected = torch.ones(2, 5, 4)
        for layer in range(2):
            for token in range(5):
                expected[layer, token, segments[layer, token].argmin()] = 0
            expected[layer, tokens[layer].argsort()[:2]] = 0
        model.prune(map(Batch.of, loader()), CrossEntropy(model.target))
        assert torch.equal(model.mask, expected)
        assert not model.mask.requires_grad
        pruned = model.layer_prompts() == 0
        assert torch.equal(pruned, (expected == 0).repeat_interleave(8, -1))

    def test_fit_prunes_half_way_and_what_is_pruned_stays_away(self, tmp_path):
        backbone = vit()
        model = attach(backbone, "kv_prompts", prune_tokens=0.3)
        seen = []
        config = {"epochs": 4, "lr": 1e-2}
        vpt.fit(
            model, loader(), config=config, on_epoch=lambda _: seen.append(model.mask.mean().item())
        )
        assert seen == pytest.approx([1, 1, 0.7, 0.7])
        before = model(images())
        with torch.no_grad():
            model.prompts[model.layer_prompts() == 0] += 1
        assert torch.equal(model(images()), before)
        vpt.save(model, tmp_path / "prompt.safetensors")
        assert torch.equal(vpt.load(tmp_path / "prompt.safetensors", backbone)(images()), before)

    def test_one_epoch_has_no_half_way(self):
        with pytest.raises(InputError, match="give train"):
            vpt.fit(attach(vit(), "kv_prompts", prune_tokens=0.3), loader(), config={"epochs": 1})
        vpt.fit(attach(vit(), "kv_prompts"), loader(), config={"epochs": 1})


class TestSelfPrompts:
    def test_means_of_stretches_of_patches(self):
        backbone = vit(reg_tokens=2)
        model = attach(backbone, "self_prompts", num_tokens=4)
        entering = []
        for block in backbone.blocks:
            block.register_forward_pre_hook(lambda _, x: entering.append(x[0][:, 3:].mean(0)))
        backbone(images(7))
        start(model, loader())
        expected = torch.stack([tokens.unflatten(0, (4, 4)).mean(1) for tokens in entering])
        close(model.prompts, expected)

    def test_centres_of_clusters(self):
        backbone = vit()
        with torch.no_grad():
            backbone.pos_embed.zero_()
        kinds = torch.randn(2, 3, 8, 8)
        which = torch.arange(16).reshape(4, 4) % 3 == 0
        rows = [torch.cat([kinds[int(w)] for w in row], -1) for row in which]
        inputs = torch.cat(rows, 1).expand(7, -1, -1, -1)
        model = attach(backbone, "self_prompts", num_tokens=2, pooling="kmeans", layers=[0])
        start(model, DataLoader(TensorDataset(inputs, LABELS), 3))
        expected = backbone.patch_embed.proj(kinds).flatten(1)
        order = (model.prompts[0] - expected[0]).norm(dim=1).argsort()
        close(model.prompts[0, order], expected)

    @BACKBONES
    def test_the_head_is_solved_for_the_pooled_prompts(self, make):
        model = attach(make(), "self_prompts")
        batches = loader()
        drawn = model.prompts.clone()
        start(model, batches)
        assert not torch.equal(model.prompts, drawn)
        probe = attach(make(), "linear_probe")
        probe.solve(model.features(images(7)).detach(), LABELS)
        close(model.head.weight, probe.head.weight, 1e-4)
        resumed = model.prompts.clone()
        model.before_epoch(epoch(model, None, LABELS, number=1))
        assert torch.equal(model.prompts, resumed)


class TestPixelPrompts:
    @pytest.mark.parametrize("shape", ["border", "patch"])
    @BACKBONES
    def test_it_is_added_to_these_pixels_only(self, make, shape):
        model = attach(make(), "pixel_prompts", shape=shape, size=5)
        count = 32 * 32 - 22 * 22 if shape == "border" else 25
        assert model.prompts.shape == (3, count)
        with torch.no_grad():
            model.prompts.copy_(torch.randn(3, count))
        prompt, values = torch.zeros(3, 32, 32), model.prompts.detach().clone()
        seen = 0
        for y in range(32):
            for x in range(32):
                inside = max(x, y) < 5 if shape == "patch" else not (4 < x < 27 and 4 < y < 27)
                if inside:
                    prompt[:, y, x] = values[:, seen]
                    seen += 1
        close(model(images()), model.logits(model.backbone(images() + prompt)))

    def test_on_clip_it_starts_as_zero_shot(self):
        backbone, templates = clip(), ["a photo of a {}.", "art of the {}."]
        model = attach(backbone, "pixel_prompts", templates=templates)
        zero_shot = attach(backbone, "zero_shot", templates=templates)
        close(model(images()), zero_shot(images()))
        assert torch.equal(model.text_features(), zero_shot.text_features())
        assert model.tunable_parameters().keys() == {"prompts"}

    def test_elsewhere_it_starts_as_the_linear_probe_and_keeps_it(self):
        model = vpt.attach(vit(), "pixel_prompts", num_classes=3)
        start(model, loader())
        probe = attach(vit(), "linear_probe")
        probe.solve(model.features(images(7)).detach(), LABELS)
        close(model(images()), probe(images()), 1e-4)
        assert model.tunable_parameters().keys() == {"prompts"}


class TestLoRA:
    @BACKBONES
    def test_the_formula(self, make):
        backbone = make()
        state = copy.deepcopy(backbone.state_dict())
        model = attach(backbone, "lora", rank=3, alpha=6)
        with torch.no_grad():
            for parameter in model.tunable_parameters().values():
                parameter.add_(0.3 * torch.randn_like(parameter))
        changed, tensors = copy.deepcopy(state), model.artifact_tensors()
        for name, b in tensors.items():
            if ".lora_B." in name:
                a = tensors[name.replace(".lora_B.", ".lora_A.")]
                weight = name.removeprefix("backbone.model.").split(".lora_B.")[0] + ".weight"
                changed[weight] = changed[weight] + 6 / 3 * b @ a
        by_hand = make()
        by_hand.load_state_dict(changed)
        expected = attach(by_hand, "linear_probe")
        expected.head.load_state_dict(model.head.state_dict())
        close(model(images()), expected(images()), 1e-4)
        close(model.fold()(images()), expected(images()), 1e-4)
        expected.backbone = attach(backbone, "linear_probe").backbone
        assert (model(images()) - expected(images())).abs().max() > 1e-2
        assert all(torch.equal(state[k], v) for k, v in backbone.state_dict().items())

    @pytest.mark.parametrize(("make", "targets"), [(vit, 2), (clip, 4)])
    def test_the_artefact_holds_lora_and_head_only(self, make, targets):
        names = attach(make(), "lora").artifact_tensors().keys()
        assert sum(".lora_A." in name for name in names) == targets
        assert sum(".lora_B." in name for name in names) == targets
        assert len(names) == 2 * targets + 2

    def test_without_peft_it_says_how_to_get_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(InputError, match=r"lora needs PEFT: pip install .*\[peft\]") as caught:
            attach(vit(), "lora")
        assert "\n" not in str(caught.value)


class TestPartOfTheBackbone:
    def check(self, backbone, model, expected):
        trained = {name for name in model.tunable_parameters() if not name.startswith("head.")}
        assert {name.removeprefix("backbone.model.") for name in trained} == expected
        theirs = dict(backbone.named_parameters())
        for name, parameter in model.backbone.model.named_parameters():
            shared = parameter.data_ptr() == theirs[name].data_ptr()
            assert shared == (name not in expected)

    @BACKBONES
    def test_bias_tuning(self, make):
        backbone = make()
        biases = {
            f"{where}.{name}".removeprefix(".")
            for where, module in backbone.named_modules()
            for name, _ in module.named_parameters(recurse=False)
            if name in {"bias", "in_proj_bias"}
        }
        if make is clip:
            biases = {name for name in biases if name.startswith("visual.")}
        self.check(backbone, attach(backbone, "bias_tuning"), biases - {"head.bias"})

    @pytest.mark.parametrize("k", [1, 2])
    def test_partial_k(self, k):
        backbone = vit(depth=3)
        expected = {
            name
            for name, _ in backbone.named_parameters()
            if name.startswith(("norm.", *(f"blocks.{2 - i}." for i in range(k))))
        }
        self.check(backbone, attach(backbone, "partial_k", k=k), expected)

    def test_partial_k_of_clip_has_the_projection(self):
        backbone = clip()
        start = ("visual.transformer.resblocks.1.", "visual.ln_post.", "visual.proj")
        names = {name for name, _ in backbone.named_parameters() if name.startswith(start)}
        self.check(backbone, attach(backbone, "partial_k"), names)


@pytest.mark.parametrize(
    ("make", "method", "options", "message"),
    [
        (lambda: vit(block_fn=ResPostBlock), "kv_prompts", {}, "kv_prompts needs attention"),
        (vit, "kv_prompts", {"segments": 5}, "segments=5 does not divide the width 32"),
        (vit, "kv_prompts", {"prune_tokens": 1}, "prune_tokens=1: .*less than 1"),
        (vit, "kv_prompts", {"project": 4}, "project=4"),
        (vit, "self_prompts", {"project": 4}, "project=4"),
        (vit, "self_prompts", {"pooling": "max"}, "pooling='max'.*'mean'"),
        (vit, "fourier_prompts", {"fourier": 1.5}, r"fourier=1\.5"),
        (vit, "pixel_prompts", {"size": 17}, "size=17: a border has at most 16"),
        (vit, "pixel_prompts", {"size": 33, "shape": "patch"}, "size=33: a patch has at most 32"),
        (vit, "partial_k", {"k": 3}, "k=3: the backbone has 2 blocks"),
        (vit, "lora", {"rank": 0}, "rank=0"),
        (vit, "gated_prompts", {"layers": [0]}, "'layers'"),
    ],
)
def test_bad_options_are_one_line(make, method, options, message):
    with pytest.raises(InputError, match=message) as caught:
        attach(make(), method, **options)
    assert "\n" not in str(caught.value)


def test_pixel_prompts_of_clip_need_names():
    with pytest.raises(InputError, match="pixel_prompts needs class_names"):
        vpt.attach(clip(), "pixel_prompts", num_classes=3)


@pytest.mark.parametrize("shape", ["border", "patch"])
def test_the_largest_pixel_prompt_is_the_whole_image(shape):
    model = attach(vit(), "pixel_prompts", shape=shape, size=16 if shape == "border" else 32)
    assert model.prompts.shape == (3, 32 * 32)
    assert isinstance(model.head, nn.Linear)

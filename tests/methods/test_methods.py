"""Promises of every method, on every kind of backbone that it fits; then method by method."""

import copy

import numpy as np
import open_clip
import pytest
import torch
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from tiny import NAMES, attach, clip, images, pairs, solved, vit

import vpt
from vpt import methods
from vpt.errors import InputError
from vpt.losses.cross_entropy import CrossEntropy
from vpt.methods.base import Batch
from vpt.methods.linear_probe import PENALTIES, THREADS, cross_validated

BACKBONES = {
    "vit": vit,
    "vit_reg": lambda: vit(reg_tokens=2, no_embed_class=True, qk_norm=True, init_values=0.5),
    "vit_avg": lambda: vit(global_pool="avg", class_token=False, fc_norm=True),
    "clip": clip,
}
PAIRS = pairs(*BACKBONES)
LABELS = torch.tensor([0, 1, 2, 2, 0, 1, 1])

TRAINED = [pair for pair in PAIRS if not solved(pair[0])]


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request):
    """A method attached to a backbone, learned where it has something to solve."""
    method, kind = request.param
    backbone = BACKBONES[kind]()
    model = attach(backbone, method)
    if model.solved:
        model.solve(model.features(images(len(LABELS))).detach(), LABELS)
    return model, backbone


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class TestEveryMethod:
    def test_gives_a_logit_a_class_whatever_the_batch(self, pair):
        model, _ = pair
        model.eval()
        logits = model(images(4))
        assert logits.shape == (4, len(NAMES))
        assert logits.isfinite().all()
        close(model(images(4)[:1]), logits[:1])

    def test_tunable_parameters_are_exactly_what_trains(self, pair):
        model, _ = pair
        tunable = model.tunable_parameters()
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        assert tunable.keys() == trains
        stored = model.artifact_tensors().keys()
        assert trains <= stored
        assert {name for name in stored if name.startswith("backbone.")} <= trains
        if model.solved:
            return
        model.train()
        model.loss(images(len(LABELS)), LABELS)[0].backward()
        moved = {name for name, p in model.named_parameters() if p.grad is not None}
        assert moved == trains

    def test_saving_and_loading_gives_the_same_logits(self, pair, tmp_path):
        model, backbone = pair
        vpt.save(model, tmp_path / "prompt.safetensors")
        torch.manual_seed(5)  # whatever is drawn anew must not matter
        again = vpt.load(tmp_path / "prompt.safetensors", backbone)
        assert torch.equal(again(images()), model.eval()(images()))
        assert again.name == model.name
        assert again.class_names == NAMES

    def test_folding_gives_the_same_logits_and_changes_nothing(self, pair):
        model, _ = pair
        tunable = set(model.tunable_parameters())
        expected = model.eval()(images())
        model.train()
        folded = model.fold()
        close(folded(images()), expected)
        assert not folded.training
        assert not folded.tunable_parameters()
        assert model.training
        assert set(model.tunable_parameters()) == tunable
        close(model.eval()(images()), expected)
        close(folded.fold()(images()), expected)

    def test_the_backbone_stays_in_eval_mode(self, pair):
        model, _ = pair
        assert model.train() is model
        assert model.training
        assert not any(module.training for module in model.backbone.modules())
        model.eval()
        assert not any(module.training for module in model.modules())

    @pytest.mark.parametrize("pair", TRAINED, ids="-".join, indirect=True)
    def test_learns_in_ones_own_loop(self, pair):
        model, backbone = pair
        inputs = images(len(LABELS))
        before = copy.deepcopy(backbone.state_dict())
        optimizer = torch.optim.SGD(model.tunable_parameters().values())
        model.train()
        losses = []
        for _ in range(4):
            loss = torch.nn.functional.cross_entropy(model(inputs), LABELS)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            gradients = [p.grad for p in model.tunable_parameters().values()]
            gradients = [g for g in gradients if g is not None]  # keys learn by `model.loss` alone
            slope = torch.nn.utils.get_total_norm(gradients).item() ** 2
            # a step that to first order lowers the loss by no more than 0.002
            optimizer.param_groups[0]["lr"] = min(0.02, 0.002 / slope)
            optimizer.step()
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0] - 1e-4
        assert all(torch.equal(before[k], v) for k, v in backbone.state_dict().items())

    def test_loss_is_the_cross_entropy_of_its_logits(self, pair):
        model, _ = pair
        model.eval()
        inputs = images(len(LABELS))
        loss, logits = model.loss(inputs, LABELS)
        with torch.no_grad():
            columns = model.frozen_columns(inputs)
        cached = Batch(model.features(inputs), LABELS, columns, cached=True)
        from_features, again, terms = model.step(cached, CrossEntropy(model.target))
        own = terms.get("cross_entropy", loss)  # of a method that adds to it
        if "classes" not in terms:  # else of two branches, which the method's tests compare
            assert own.item() == pytest.approx(
                torch.nn.functional.cross_entropy(model(inputs), LABELS).item(), rel=1e-5
            )
        close(from_features, loss)
        close(again, logits)


def features_move(model):
    """Tells if a change of a tensor changes the text features."""
    given = model.features(images()).detach()

    @torch.no_grad()
    def moves(tensor):
        before, kept = model.text_features(given).clone(), tensor.clone()
        tensor.add_(torch.randn_like(tensor))
        moved = not torch.equal(model.text_features(given), before)
        tensor.copy_(kept)
        return moved

    return moves


@pytest.mark.parametrize("method", methods.names())
def test_every_method_gives_its_text_features_head_or_prompts(method):
    model = attach(clip(), method)
    if getattr(model, "head", None) is None:
        features = model.text_features(model.features(images()))
        assert features.shape[-2:] == (len(NAMES), model.backbone.feature_dim)
        learned = any(map(features_move(model), model.tunable_parameters().values()))
        assert features.requires_grad == learned
    else:
        assert isinstance(model.head, torch.nn.Linear)


@pytest.mark.parametrize("layers", [[0], [1], [0, 1], None], ids=str)
def test_partial_layers(layers):
    backbone = vit()
    model = attach(backbone, "vpt_deep", num_tokens=3, layers=layers)
    assert model.prompts.shape == (len(layers or [0, 1]), 3, 32)
    if layers == [0]:
        shallow = attach(backbone, "vpt_shallow", num_tokens=3)
        shallow.load_state_dict(model.artifact_tensors(), strict=False)
        close(shallow.eval()(images()), model.eval()(images()))


def test_prompts_of_a_layer_reach_what_follows_only():
    model = attach(vit(depth=3), "vpt_deep", layers=[0, 2]).eval()
    first = model(images())
    with torch.no_grad():
        model.prompts[1] += torch.randn(32)  # not the same for all: norms take that away
    assert (model(images()) - first).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["vpt_deep", "vpt_shallow"])
def test_dropout_masks_differ_per_sample_and_are_off_in_eval(method):
    model = attach(vit(), method, dropout=0.5)
    plain = attach(vit(), method)
    same = images(1).expand(4, -1, -1, -1)
    torch.manual_seed(3)
    model.train()
    features = model.features(same)
    for one in range(4):
        for other in range(one):
            assert (features[one] - features[other]).abs().max() > 1e-3
    torch.manual_seed(3)
    assert torch.equal(model.features(same), features)
    model.eval()
    close(model(same), plain.eval()(same))
    close(model.fold()(same), plain(same))


def test_dropout_keeps_the_mean():
    model = attach(vit(), "vpt_deep", dropout=0.5, num_tokens=1).train()
    seen = []
    model.backbone.pooled = lambda images, prompts: seen.append(prompts) or images
    model.features(images(2000, size=1))
    prompts = torch.stack(list(seen[0].sets)).detach()
    kept = prompts != 0
    assert prompts.shape == (2, 2000, 1, 32)
    assert kept.float().mean().item() == pytest.approx(0.5, abs=0.02)
    expected = (2 * model.prompts.detach())[:, None].expand_as(prompts)
    close(prompts[kept], expected[kept])


@pytest.mark.parametrize("method", ["vpt_deep", "vpt_shallow", "random_prompts"])
def test_projection(method):
    model = attach(vit(), method, num_tokens=4, project=6).eval()
    assert model.prompts.shape[1:] == (4, 6)
    assert model.projection.weight.shape == (32, 6)
    assert ("projection.weight" in model.tunable_parameters()) == (method != "random_prompts")
    plain = attach(vit(), method, num_tokens=4).eval()
    with torch.no_grad():
        plain.prompts.copy_(model.projection(model.prompts))
        plain.head.load_state_dict(model.head.state_dict())
    close(plain(images()), model(images()))
    close(model.fold()(images()), model(images()))


@pytest.mark.parametrize("method", ["vpt_deep", "vpt_shallow"])
def test_position_makes_no_difference_but_for_rounding(method):
    one = attach(vit(), method, position="prepend").eval()
    two = attach(vit(), method, position="append").eval()
    close(one(images()), two(images()))


def test_random_prompts_are_those_of_vpt_deep_and_never_train():
    model = attach(vit(), "random_prompts", num_tokens=3, dropout=0.5)
    assert model.tunable_parameters().keys() == {"head.weight", "head.bias"}
    assert torch.equal(model.prompts, attach(vit(), "vpt_deep", num_tokens=3).prompts)
    assert torch.equal(model.train().features(images()), model.eval().features(images()))


class TestCoOp:
    @pytest.mark.parametrize("position", ["end", "middle", "front"])
    def test_words_at_the_end_are_the_hand_written_prompt(self, position):
        backbone = clip()
        model = attach(backbone, "coop", init="a photo of a", position=position)
        assert model.context.shape == (4, 16)
        texts = {
            "end": "a photo of a {}.",
            "middle": "a photo {} of a.",
            "front": "{} a photo of a.",
        }
        texts = [texts[position].format(name.replace("_", " ")) for name in NAMES]
        tokens = open_clip.SimpleTokenizer(context_length=24)(texts)
        close(model.text_features(), backbone.encode_text(tokens))

    def test_every_class_may_have_a_context_of_its_own(self):
        model = attach(clip(), "coop", num_tokens=4, class_specific=True).eval()
        assert model.context.shape == (len(NAMES), 4, 16)
        assert not torch.equal(model.context[0], model.context[1])
        before = model.text_features()
        with torch.no_grad():
            model.context[1] += 0.1 * torch.randn(16)
        changed = (model.text_features() - before).abs().amax(1) > 1e-4
        assert changed.tolist() == [False, True, False]
        words = attach(clip(), "coop", init="a photo of a", class_specific=True)
        assert torch.equal(words.context[0], words.context[1])
        close(words.text_features(), attach(clip(), "coop", init="a photo of a").text_features())

    def test_classes_do_not_see_each_other(self):
        model = attach(clip(), "coop", num_tokens=4)
        alone = vpt.attach(clip(), "coop", class_names=NAMES[:2], num_tokens=4)
        alone.load_state_dict(model.artifact_tensors(), strict=False)
        close(alone.text_features(), model.text_features()[:2])

    def test_ones_own_tokenizer_is_used(self):
        seen = []
        own = open_clip.SimpleTokenizer(context_length=24)

        def tokenizer(texts):
            seen.extend(texts)
            return own(texts)

        model = attach(clip(), "coop", tokenizer=tokenizer, num_tokens=4)
        assert any("tabby cat." in text for text in seen)
        close(model.text_features(), attach(clip(), "coop", num_tokens=4).text_features())


def test_zero_shot_is_the_ensemble_made_by_hand():
    backbone, templates = clip(), ["a photo of a {}.", "art of the {}."]
    tokenizer = open_clip.SimpleTokenizer(context_length=24)
    model = attach(backbone, "zero_shot", templates=templates)
    classes = []
    for name in ["tabby cat", "dog", "red panda"]:
        texts = [template.format(name) for template in templates]
        classes.append(backbone.encode_text(tokenizer(texts), normalize=True).mean(0))
    classes = torch.nn.functional.normalize(torch.stack(classes), dim=-1)
    features = backbone.encode_image(images(), normalize=True)
    close(model(images()), backbone.logit_scale.exp() * features @ classes.T, 1e-4)
    assert not model.tunable_parameters()


@pytest.mark.parametrize("template", ["a photo", "a {} {}", "a {name}", "{"])
def test_a_template_needs_one_place_for_the_name(template):
    with pytest.raises(InputError, match="template") as caught:
        attach(clip(), "zero_shot", templates=[template])
    assert "\n" not in str(caught.value)


def test_braces_in_a_class_name_are_kept():
    model = vpt.attach(clip(), "zero_shot", class_names=["a {} b", "{x}"])
    assert model(images()).isfinite().all()


def scikit_learns(features, labels):
    """The regression whose penalty scikit-learn chooses alone; of standardised features."""
    folds = StratifiedKFold(min(5, np.bincount(labels).min()), shuffle=True, random_state=0)
    return LogisticRegressionCV(
        Cs=PENALTIES,
        l1_ratios=(0,),
        cv=folds,
        scoring="neg_log_loss",
        max_iter=1000,
        use_legacy_attributes=False,
    ).fit(features, labels)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("shots", [1, 2, 8])
def test_linear_probe_is_scikit_learns(classes, shots):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), shots)
    features = rng.normal(size=(len(labels), 32)) * 3 + 5
    features[np.arange(len(labels)), labels] += 4
    test = rng.normal(size=(50, 32)) * 3 + 5
    test[np.arange(50), rng.integers(classes, size=50)] += 4
    model = vpt.attach(vit(), "linear_probe", num_classes=classes)
    model.solve(torch.tensor(features).float(), torch.tensor(labels))
    features = features.astype(np.float32).astype(np.float64)
    scaler = StandardScaler().fit(features)
    scaled, single = scaler.transform(features), LogisticRegression(max_iter=1000)
    probe = scikit_learns(scaled, labels) if shots > 1 else single.fit(scaled, labels)
    logits = model.logits(torch.tensor(test).float())
    assert logits.softmax(-1).detach().numpy() == pytest.approx(
        probe.predict_proba(scaler.transform(test)), abs=2e-3
    )
    assert (logits.argmax(-1).numpy() == probe.predict(scaler.transform(test))).all()


@pytest.mark.parametrize("noise", [1, 3, 9, 30])
def test_the_penalty_is_that_of_all_that_could_be_tried(noise):
    rng = np.random.default_rng(noise)
    labels = np.repeat(np.arange(6), 10)
    features = rng.normal(size=(60, 32)) * noise
    features[np.arange(60), labels] += 4
    features = StandardScaler().fit_transform(features)
    found = cross_validated(features, labels, 5).C
    everything = scikit_learns(features, labels)
    losses = -np.mean(everything.scores_.reshape(5, len(PENALTIES)), 0)
    assert losses[list(PENALTIES).index(found)] <= losses.min() + 1e-3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", [141, 149, 195, 291])
def test_a_search_that_comes_to_rest_does_not_warn(seed):
    """Of features at random the best weights are next to nothing."""
    labels = np.repeat(np.arange(4), 2)
    features = np.random.default_rng(seed).normal(size=(8, 64))
    assert cross_validated(StandardScaler().fit_transform(features), labels, 2).C in PENALTIES


def test_linear_probe_is_solved_on_one_thread(monkeypatch):
    """Small products take ten times as long on two that wait for each other."""
    seen, plain = [], LogisticRegression.fit

    def threads():
        return {pool["num_threads"] for pool in THREADS.info() if pool["user_api"] == "blas"}

    monkeypatch.setattr(
        LogisticRegression, "fit", lambda *args: seen.append(threads()) or plain(*args)
    )
    model = vpt.attach(vit(), "linear_probe", num_classes=2)
    with threadpool_limits(2, user_api="blas"):
        model.solve(model.features(images(6)).detach(), torch.arange(6) % 2)
        assert threads() == {2}
    assert seen and all(found == {1} for found in seen)


def test_linear_probe_never_predicts_a_class_without_images():
    model = vpt.attach(vit(), "linear_probe", num_classes=4)
    labels = torch.tensor([0, 2, 0, 2, 0, 2])
    features = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    model.solve(features, labels)
    assert set(model.logits(torch.randn(100, 32)).argmax(-1).tolist()) <= {0, 2}


@pytest.mark.parametrize("kind", BACKBONES)
def test_full_finetune_trains_a_copy_of_the_image_tower(kind):
    backbone = BACKBONES[kind]()
    model = attach(backbone, "full_finetune")
    state = copy.deepcopy(backbone.state_dict())
    tower = {p.data_ptr() for p in model.backbone.image_tower.parameters()}
    trains = {p.data_ptr() for p in model.tunable_parameters().values()}
    assert trains == tower | {p.data_ptr() for p in model.head.parameters()}
    assert not tower & {p.data_ptr() for p in backbone.parameters()}
    optimizer = torch.optim.SGD(model.tunable_parameters().values(), lr=0.1)
    model.loss(images(len(LABELS)), LABELS)[0].backward()
    optimizer.step()
    assert all(torch.equal(state[k], v) for k, v in backbone.state_dict().items())
    changed = [
        not torch.equal(state[k], v)
        for k, v in model.backbone.model.state_dict().items()
        if k in state
    ]
    assert any(changed)


@pytest.mark.parametrize(
    ("make", "method", "arguments", "message"),
    [
        (vit, "coop", {"class_names": NAMES}, "coop needs a CLIP.*timm"),
        (vit, "zero_shot", {"class_names": NAMES}, "zero_shot needs a CLIP.*timm"),
        (clip, "coop", {}, "coop needs class_names"),
        (clip, "coop", {"num_classes": 3}, "coop needs class_names"),
        (vit, "vpt_deep", {}, "vpt_deep needs num_classes or class_names"),
        (vit, "vpt_deep", {"num_classes": 1}, "at least two classes"),
        (vit, "vpt_deep", {"num_classes": 0}, "at least two classes"),
        (vit, "vpt_deep", {"class_names": ["cat"]}, "at least two classes.*cat"),
        (vit, "vpt_deep", {"class_names": ["a", "b", "a"]}, "class names twice, a: give each"),
        (clip, "coop", {"class_names": ["a", "a"]}, "class names twice, a: give each"),
        (vit, "vpt_deep", {"class_names": [0, 1]}, "class name 0 is a int: give names as texts"),
        (vit, "vpt_deep", {"class_names": ["a", None]}, "class name None is a NoneType"),
        (clip, "coop", {"class_names": {1: "a", 0: "b"}}, "class_names is a dict: give a list"),
        (vit, "vpt_deep", {"class_names": {"a", "b"}}, "class_names is a set: give a list"),
        (vit, "vpt_deep", {"class_names": "ab"}, "class_names is a str: give a list"),
        (vit, "vpt_deep", {"num_classes": 2, "class_names": NAMES}, "num_classes=2, but 3"),
        (clip, "coop", {"class_names": ["a" + " long" * 40, "b"]}, "'?a long.*does not fit"),
        (clip, "coop", {"class_names": NAMES, "num_tokens": 30}, "does not fit"),
        (clip, "zero_shot", {"class_names": ["a" + " long" * 40, "b"]}, "does not fit"),
        (vit, "vpt_deep", {"num_classes": 2, "layers": [0, 2]}, r"layers=\[0, 2\].*0 to 1"),
        (vit, "vpt_deep", {"num_classes": 2, "layers": [-1]}, r"layers=\[-1\]"),
        (vit, "vpt_deep", {"num_classes": 2, "layers": [1, 0]}, r"layers=\[1, 0\].*ascending"),
        (vit, "vpt_deep", {"num_classes": 2, "layers": []}, r"layers=\[\]"),
        (vit, "vpt_shallow", {"num_classes": 2, "layers": [0]}, "'layers'"),
        (vit, "vpt_dep", {"num_classes": 2}, "'vpt_dep'.*'vpt_deep'"),
        (vit, "base", {"num_classes": 2}, "'base'"),
        (clip, "coop", {"class_names": NAMES, "position": "begin"}, "position='begin'.*front"),
    ],
)
def test_what_cannot_be_attached_is_one_line(make, method, arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        vpt.attach(make(), method, **arguments)
    assert "\n" not in str(caught.value)

"""PromptSRC beyond its reference numbers: the average over epochs, the teacher, multilabel."""

import pytest
import torch
from tiny import NAMES, attach, clip, images, loader, samples

import vpt
from vpt.losses.cross_entropy import CrossEntropy
from vpt.methods.base import Batch
from vpt.methods.promptsrc import epoch_weights

CONFIG = {"epochs": 4, "lr": 1e-2, "schedule": "constant", "batch_size": 4, "seed": 3}
OPTIONS = {"average_epoch": 2.5, "average_std": 1.0, "num_tokens": 2, "templates": ["a {}."]}


def data(model, **options):
    return loader(model, samples([0, 1, 2, 2, 0, 1, 1]), 4, **options)


def test_the_result_is_the_weighted_mean_of_the_epochs():
    model, seen = attach(clip(), "promptsrc", **OPTIONS), []
    plain = attach(clip(), "promptsrc", **{**OPTIONS, "average_epoch": None})

    def note(_):
        seen.append({n: p.detach().clone() for n, p in plain.tunable_parameters().items()})

    vpt.fit(plain, data(plain), config=CONFIG, on_epoch=note)
    vpt.fit(model, data(model), config=CONFIG)
    weights = epoch_weights(4, 2.5, 1.0)
    for name, parameter in model.tunable_parameters().items():
        expected = sum(w * epoch[name] for w, epoch in zip(weights, seen, strict=True))
        torch.testing.assert_close(parameter, expected)
        assert (parameter - seen[-1][name]).abs().max() > 1e-4


def test_an_interrupted_training_averages_the_same(tmp_path):
    whole = attach(clip(), "promptsrc", **OPTIONS)
    vpt.fit(whole, data(whole), config=CONFIG)

    class Stop(Exception):
        pass

    def stop(history):
        if len(history) == 3:  # before the third epoch's checkpoint is written
            raise Stop

    path, first = tmp_path / "checkpoint.pt", attach(clip(), "promptsrc", **OPTIONS)
    with pytest.raises(Stop):
        vpt.fit(first, data(first), config=CONFIG, checkpoint=path, on_epoch=stop)
    second = attach(clip(), "promptsrc", **OPTIONS)
    vpt.fit(second, data(second), config=CONFIG, checkpoint=path)
    for name, tensor in whole.artifact_tensors().items():
        assert torch.equal(tensor, second.artifact_tensors()[name]), name
    # a training of its own does not go on from what another has summed
    third = attach(clip(), "promptsrc", **OPTIONS)
    start = {n: p.detach().clone() for n, p in third.tunable_parameters().items()}
    vpt.fit(third, data(third), config=CONFIG)
    third.load_state_dict(start, strict=False)
    vpt.fit(third, data(third), config=CONFIG)
    assert torch.equal(third.context, whole.context)


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_the_teacher_is_cached_where_that_is_exact(augment):
    model, calls = attach(clip(), "promptsrc", **OPTIONS), []
    columns = model.frozen_columns
    model.frozen_columns = lambda inputs: calls.append(len(inputs)) or columns(inputs)
    vpt.fit(model, data(model, augment=augment), config=CONFIG)
    assert sum(calls) == 7 if augment == "none" else sum(calls) > 7


def test_multilabel_divergence_is_that_of_single_classes():
    model = attach(clip(), "promptsrc", multilabel=True, **OPTIONS).eval()
    inputs, labels = images(4), torch.randint(2, (4, len(NAMES)))
    batch = Batch(inputs, labels, model.frozen_columns(inputs))
    found = model.step(batch, CrossEntropy(model.target))
    teacher = model.similarities(batch.columns["teacher"], model.teacher_texts).sigmoid()
    student = found.logits.sigmoid()
    by_hand = teacher * (teacher / student).log()
    by_hand = by_hand + (1 - teacher) * ((1 - teacher) / (1 - student)).log()
    torch.testing.assert_close(found.terms["logits"], by_hand.mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sum(found.terms.values()), found.total)

"""`vpt bench recipe` says what the default recipe takes."""

import pytest
import tiny
import torch
from tiny import vpt_cli

import vpt
from vpt import run as stages
from vpt.bench import recipe


@pytest.mark.parametrize("helps", [False, True])
def test_a_row_for_each_number_of_shots(capfd, monkeypatch, helps):
    record = {"epoch": 0, "accuracy": 1.0, "seconds": 0.0} | ({"loss": 0.0} if helps else {})
    seen = []
    monkeypatch.setattr(recipe, "fit", lambda prepared, **_: seen.append(prepared) or [record])
    monkeypatch.setattr(recipe, "pass_seconds", lambda prepared: 1e-9)
    keys = ["backbone.name=tiny_clip", "data.name=digits"]
    code, out, _ = vpt_cli(capfd, monkeypatch, "bench", "recipe", *keys, "--shots", 1, "--shots", 2)
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["10", "10"], ["20", "10"]]
    assert all(
        line.endswith("trained" if helps else "left as it starts") for line in out.splitlines()[1:]
    )
    assert [type(prepared) for prepared in seen] == [stages.Prepared] * 2
    assert not any(prepared.folder.path.exists() for prepared in seen)


def test_a_pass_is_of_all_training_images(monkeypatch):
    config = recipe.load_run(
        "vpt_deep", ["backbone.name=tiny_clip", "data.name=digits", "data.shots=2"]
    )
    prepared = stages.prepare(config, log=lambda line: None)
    counts, forward = [], type(prepared.model.backbone).forward

    def spy(self, images, prompts=None):
        assert prompts is None
        counts.append(len(images))
        return forward(self, images, prompts)

    monkeypatch.setattr(type(prepared.model.backbone), "forward", spy)
    assert recipe.pass_seconds(prepared) > 0
    assert counts == [20] * (recipe.PASSES + 1)


def test_images_are_counted_forward_and_backward():
    model = vpt.attach(tiny.vit(), num_classes=3)
    count = recipe.count_images(model.backbone)
    model(tiny.images(2)).sum().backward()
    with torch.no_grad():
        model(tiny.images(3))
    assert count == {"forward": 5, "backward": 2}

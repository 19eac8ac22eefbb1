"""Learning-rate schedules against those of KMnP/vpt and Dassl."""

import math

import pytest
from golden_case import golden_json

from vpt.config import TrainConfig
from vpt.training.epochs import learning_rate


def check(config, expected):
    actual = [learning_rate(config, epoch) for epoch in range(config.epochs)]
    assert actual == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("case", golden_json("schedule_vpt")["cases"], ids=str)
def test_vpt(case):
    config = TrainConfig(
        schedule=case["scheduler"],
        lr=case["base_lr"],
        epochs=case["total_epochs"],
        warmup_epochs=case["warmup_epochs"],
    )
    check(config, case["lr_used_in_epoch"])


@pytest.mark.parametrize("case", golden_json("schedule_dassl")["cases"], ids=str)
def test_dassl(case):
    settings = case["config"]
    config = TrainConfig(
        schedule="dassl",
        lr=settings["LR"],
        epochs=settings["MAX_EPOCH"],
        warmup_epochs=settings["WARMUP_EPOCH"],
        warmup_lr=settings["WARMUP_CONS_LR"],
    )
    check(config, case["lr_used_in_epoch"])


def test_constant():
    check(TrainConfig(schedule="constant", lr=0.1, epochs=3), [0.1] * 3)


def test_at_most_half_of_the_epochs_are_warm_up():
    few = {"epochs": 4, "warmup_epochs": 10, "lr": 1.0}
    check(TrainConfig(schedule="cosine", **few), [0, 0.5, 1, 0.5])
    falling = 0.5 + 0.5 * math.cos(math.pi / 4)
    check(TrainConfig(schedule="dassl", warmup_lr=0.1, **few), [0.1, 0.1, 1, falling])
    check(TrainConfig(schedule="cosine", lr=1.0, epochs=1, warmup_epochs=1), [1])

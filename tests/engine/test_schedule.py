"""Learning-rate schedules against those of KMnP/vpt and Dassl."""

import pytest
from golden_case import golden_json

from vpt.config import TrainConfig
from vpt.engine.epochs import learning_rate


def check(config, expected):
    actual = [learning_rate(config, epoch) for epoch in range(config.epochs)]
    assert actual == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("case", golden_json("schedule_vpt")["cases"], ids=str)
def test_vpt(case):
    config = TrainConfig(
        schedule="cosine",
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

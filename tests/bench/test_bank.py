"""`vpt bench serve`, its bank: a row for each number of tasks, and none where logits differ."""

import json

import pytest
import torch

from vpt.bench.bank import bench
from vpt.errors import InputError
from vpt.serve.bank import PromptBank


def test_a_row_for_each_number_of_tasks(tmp_path):
    bench(tmp_path, rounds=1, small=True)
    result = json.loads((tmp_path / "bank.json").read_text())
    assert [(row["tasks"], row["distinct"]) for row in result["rows"]] == [(1, 1), (3, 3)]
    for row in result["rows"]:
        assert row["of_bare"] == pytest.approx(row["bank"] / row["bare"])
        assert row["over_swap"] == pytest.approx(row["bank"] / row["swap"])


def test_nothing_is_measured_where_logits_differ(tmp_path, monkeypatch):
    real = PromptBank.__call__
    monkeypatch.setattr(
        PromptBank, "__call__", lambda *args: [torch.roll(row, 1) for row in real(*args)]
    )
    with pytest.raises(InputError, match="1 tasks, bank: logits differ"):
        bench(tmp_path, rounds=1, small=True)
    assert not (tmp_path / "bank.json").exists()

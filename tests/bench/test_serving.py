"""`vpt bench serve`: a load that is answered, refused in time, and hostile in part."""

import json

import pytest
from running import png, put, serving
from tiny import vpt_cli

from vpt.bench import bank, load
from vpt.bench import serving as bench
from vpt.errors import InputError


def test_every_load_is_measured(tmp_path, capfd, monkeypatch):
    options = ["--small", "--rounds", "1", "--out", tmp_path]
    code, _, _ = vpt_cli(capfd, monkeypatch, "bench", "serve", *options)
    assert code == 0
    assert json.loads((tmp_path / "bank.json").read_text())["rows"]
    result = json.loads((tmp_path / "serve.json").read_text())
    rows = {row["load"]: row for row in result["rows"]}
    assert len(rows) == 5
    for row in rows.values():
        assert row["answered"] > 0
        assert 0 < row["p50_ms"] <= row["p99_ms"]
    twice = rows["twice, Zipf"]
    assert twice["answered"] + twice["refused"] == bench.SMALL.requests
    assert twice["refused"] > 0
    assert twice["bound_ms"] > 0
    assert rows["a tenth hostile"]["hostile"] == 10


def test_requests_leave_at_their_times(tmp_path):
    put(tmp_path, "pets", "vpt_deep_clip")
    with serving(tmp_path, queue=20) as (client, _, _):
        request = bench._request("/v1/tasks/pets/predict", png())
        replies = load.load(client.base_url.port, [request] * 20, rate=40)
        assert {reply.status for reply in replies} == {200}
        assert replies[-1].finished > 0.2  # at 40 a second
        assert json.loads(replies[0].body)["task"] == "pets"
        (gone,) = load.load(1, [request], rate=None)
        assert gone.status == 0
    with pytest.raises(InputError, match="answered"):
        bench._row("x", 1, [gone])


def test_a_broken_bound_is_a_line():
    kept = {"load": "twice", "p99_ms": 90.0, "bound_ms": 100.0}
    free = {"load": "half", "p99_ms": 900.0, "bound_ms": None}
    grown = {**free, "load": "hostile", "grown_mb": 19.0}
    assert bench.broken([kept, free, grown]) == []
    late, large = {**kept, "p99_ms": 101.0}, {**grown, "grown_mb": 21.0}
    assert bench.broken([late, free, large]) == [
        "server, twice: p99 101 ms, above 100 ms",
        "server, hostile: 21 MB grown, above 20 MB",
    ]


def test_a_broken_bound_fails_the_command_in_a_line(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(bank, "bench", lambda *_: ["bank, 9 tasks: slow"])
    monkeypatch.setattr(bench, "bench", lambda *_: ["server, twice: late"])
    code, _, err = vpt_cli(capfd, monkeypatch, "bench", "serve", "--out", tmp_path)
    assert code == 1
    assert "bank, 9 tasks: slow; server, twice: late" in err
    assert err.count("\n") == 1
    code, _, err = vpt_cli(capfd, monkeypatch, "bench", "serve", "seed=1")
    assert code == 1
    assert "seed=1: serve takes no KEY=VALUE" in err

"""`vpt bench serve`: a load that is answered, refused in time, and hostile in part."""

import json

import pytest
from running import png, put, serving

from vpt.bench import load
from vpt.bench import serving as bench
from vpt.errors import InputError


def test_every_load_is_measured(tmp_path):
    bench.bench(tmp_path, small=True)
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
    with serving(tmp_path, queue=16) as (client, _, _):
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

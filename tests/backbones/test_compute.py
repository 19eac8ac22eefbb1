"""The ways to compute that change no number: compiled, checkpointed, on fused kernels, unsynced."""

import pytest
import tiny
import torch
from tiny import clip, images, vit
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vpt.config import EngineConfig, TrainConfig
from vpt.training.fit import fit

METHODS = [
    (vit, "vpt_shallow", {}),
    (vit, "vpt_deep", {}),
    (vit, "vpt_deep", {"layers": [0]}),
    (vit, "vpt_deep", {"dropout": 0.5}),
    (clip, "vpt_deep", {}),
    (clip, "coop", {"num_tokens": 4}),
    (clip, "coop", {"num_tokens": 4, "class_specific": True}),
    (clip, "cocoop", {}),
    (clip, "ivlp", {"num_tokens": 3}),
    (clip, "maple", {}),
]


def attach(make, method, options):
    return tiny.attach(make(), method, **options).train()


def gradients(model, step):
    torch.manual_seed(1)  # the same dropout
    model.zero_grad()
    loss, _ = step(images(), torch.arange(3))
    loss.backward()
    return [parameter.grad.clone() for parameter in model.tunable_parameters().values()]


def assert_same(one, other):
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize(("make", "method", "options"), METHODS)
def test_a_step_compiles_whole(make, method, options):
    torch.compiler.reset()  # else the cases count as recompilations of one function
    model = attach(make, method, options)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    if options.get("dropout"):  # the compiled one draws other masks
        assert all(g.isfinite().all() for g in gradients(model, compiled))
    else:
        assert_same(gradients(model, compiled), gradients(model, model.loss))


@pytest.mark.slow  # it calls a C++ compiler
@pytest.mark.parametrize("method", ["vpt_deep", "coop"])
def test_a_compiled_fit_is_the_same(method):
    histories = []
    counters.clear()
    for compiled in (True, False):
        model = attach(clip, method, {"num_tokens": 4})
        data = torch.utils.data.TensorDataset(images(6), torch.arange(6) % 3)
        loader = torch.utils.data.DataLoader(data, 3)
        engine = EngineConfig(compile=compiled)
        config = TrainConfig(epochs=3, warmup_epochs=0, lr=1e-2)
        histories.append(
            [record["loss"] for record in fit(model, loader, None, config, engine=engine)]
        )
    assert counters["frames"]["ok"] > 0
    assert histories[0] == pytest.approx(histories[1], rel=1e-4)


@pytest.mark.parametrize(("make", "method", "options"), METHODS)
def test_checkpointing_keeps_less_and_changes_nothing(make, method, options):
    model = attach(make, method, options)
    kept, found = [], []
    for checkpointing in (False, True):
        model.backbone.checkpointing = checkpointing
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, tensors=tensors: tensors.append(t.numel()) or t, lambda t: t
        ):
            found.append(gradients(model, model.loss))
        kept.append(sum(tensors))
    assert_same(*found)
    assert kept[1] < kept[0]


@pytest.mark.parametrize(("make", "method", "options"), METHODS)
def test_attention_stays_fused(make, method, options):
    model = attach(make, method, options)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        gradients(model, model.loss)


def test_nothing_runs_backward_before_the_first_prompted_block():
    counts = []
    for layers in ([3], [0, 3]):
        model = attach(lambda: vit(depth=4), "vpt_deep", {"layers": layers})
        with FlopCounterMode(display=False) as counter:
            gradients(model, model.loss)
        counts.append(counter.get_total_flops())
    forward = FlopCounterMode(display=False)
    with forward, torch.no_grad():
        model.backbone(images())
    assert counts[0] < 1.5 * forward.get_total_flops() < counts[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("make", "method", "options"), METHODS)
def test_a_step_never_waits_for_the_gpu(make, method, options):
    model = attach(make, method, options).cuda()
    batch, labels = images().cuda(), torch.arange(3).cuda()
    for mode in ("default", "error"):  # the first step may fill caches
        torch.cuda.set_sync_debug_mode(mode)
        try:
            model.loss(batch, labels)[0].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

"""The ONNX file: ONNX Runtime's logits are torch's, and what no image changes is constant."""

import json
import os
import sys
from functools import cache, partial, partialmethod
from pathlib import Path

import onnx
import onnxruntime
import pytest
import tiny
import torch
from tiny import NAMES, clip, images, needs_clip, vit, vpt_cli

import vpt
from vpt import artifact, backbones, methods
from vpt.errors import InputError
from vpt.run import NOTICE

pytest.importorskip("torch", "2.15")  # older exporters know fewer operators

BACKBONES = {
    "vit": lambda: vit(reg_tokens=2, no_embed_class=True, qk_norm=True, init_values=0.5),
    "clip": clip,
}
PAIRS = [(m, "clip" if needs_clip(m) else "vit") for m in methods.names()]
PAIRS += [("vpt_deep", "clip"), ("linear_probe", "clip")]
CONSTANT = {"coop", "random_prompts", "vpt_deep", "vpt_shallow", "zero_shot"}


def attach(method, kind="vit", **options):
    return tiny.attach(BACKBONES[kind](), method, **options)


def export(model, path):
    from vpt.export import export

    return export(model, path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A prompted model and its file."""

    @cache
    def make(method, kind):
        path = tmp_path_factory.mktemp("onnx") / "pets.onnx"
        model = attach(method, kind)
        export(model, path)
        return model, path

    return make


def run(path, batch):
    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0])


@pytest.mark.parametrize(("method", "kind"), PAIRS)
class TestEveryMethod:
    @torch.no_grad()
    def test_logits_are_those_of_torch(self, exported, method, kind):
        model, path = exported(method, kind)
        for count in (1, 2, 7):
            batch = images(count)
            torch.testing.assert_close(run(path, batch), model.eval()(batch), rtol=1e-4, atol=1e-4)

    def test_the_file_serves_alone(self, exported, method, kind):
        model, path = exported(method, kind)
        session = onnxruntime.InferenceSession(path)
        (entry,), (exit_) = session.get_inputs(), session.get_outputs()
        assert isinstance(entry.shape[0], str)
        assert entry.shape[1:] == [3, 32, 32]
        assert exit_[0].shape[1:] == [len(NAMES)]
        metadata = session.get_modelmeta().custom_metadata_map
        assert json.loads(metadata["class_names"]) == NAMES
        assert json.loads(metadata["preprocess"]) == model.backbone.preprocess.to_dict()
        assert metadata["fingerprint"] == model.backbone.fingerprint()
        assert metadata["version"] == artifact.package_version()
        assert [file.name for file in path.parent.iterdir()] == ["pets.onnx"]

    def test_no_path_of_this_machine_is_in_it(self, exported, method, kind):
        content = exported(method, kind)[1].read_bytes()
        assert b".py" not in content
        assert str(Path.cwd()).encode() not in content


def products(path):
    return sum(node.op_type in {"MatMul", "Gemm"} for node in onnx.load(path).graph.node)


@pytest.mark.parametrize(("method", "kind"), [pair for pair in PAIRS if pair[0] in CONSTANT])
def test_prompts_cost_no_products(exported, method, kind):
    """There are as many as in the linear probe: no prompt's projections, no text tower."""
    _, path = exported(method, kind)
    _, probe = exported("linear_probe", kind)
    assert products(path) == products(probe)
    assert abs(path.stat().st_size - probe.stat().st_size) < 30_000  # a text tower has 3 MB


def test_a_projection_of_prompts_is_folded(tmp_path, exported):
    export(attach("vpt_deep", project=8), tmp_path / "pets.onnx")
    assert products(tmp_path / "pets.onnx") == products(exported("linear_probe", "vit")[1])


def test_gated_prompts(tmp_path):
    model = attach("vpt_deep", gated=True)
    torch.nn.init.ones_(model.gates)
    export(model, tmp_path / "pets.onnx")  # compares the logits


def test_the_model_still_trains(exported):
    model, _ = exported("vpt_deep", "vit")
    assert not model.is_folded
    model.train().loss(images(2), torch.tensor([0, 1]))[0].backward()
    assert model.prompts.grad.abs().sum() > 0
    model.eval().zero_grad()


def test_the_decision_and_the_notice_go_along(tmp_path):
    decision = {"temperature": 1.5, "thresholds": {NAMES[0]: 0.3}}
    artifact.save(attach("vpt_deep"), tmp_path / "a.safetensors", decision=decision, medical=True)
    export(vpt.load(tmp_path / "a.safetensors", backbone=BACKBONES["vit"]()), tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["decision"]) == decision
    assert metadata["notice"] == NOTICE


def test_large_weights_get_a_file_of_their_own(tmp_path, monkeypatch):
    save = partialmethod(torch.onnx.ONNXProgram.save, external_data=True)
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", save)
    model, path = attach("linear_probe"), tmp_path / "new" / "pets.onnx"
    files, _ = export(model, path)
    assert files == sorted(path.parent.iterdir()) == [path, path.with_name("pets.onnx.data")]
    with torch.no_grad():
        torch.testing.assert_close(run(path, images(2)), model(images(2)), rtol=1e-4, atol=1e-4)


def test_wrong_logits_leave_no_file(tmp_path):
    model, path = attach("linear_probe"), tmp_path / "pets.onnx"
    path.write_text("before")
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"pets\.onnx: not written: ONNX Runtime's logits are nan"):
        export(model, path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "before"


@pytest.mark.parametrize("change", [1.01, 0.999])
def test_every_logit_is_compared(tmp_path, exported, change):
    from vpt.export import TOLERANCE, _difference

    model, path = exported("linear_probe", "vit")
    other = model.fold()
    other.head = torch.nn.Linear(other.head.in_features, other.head.out_features)
    other.head.load_state_dict(model.head.state_dict())
    batches = images(4).split(3)
    assert _difference(other, path, batches) <= TOLERANCE
    with torch.no_grad():
        other.head.bias[2] *= change
    assert _difference(other, path, batches) > TOLERANCE


@pytest.fixture
def cli(capfd, monkeypatch):
    return partial(vpt_cli, capfd, monkeypatch)


@pytest.fixture
def artefact(tmp_path):
    model = vpt.attach(backbones.load("tiny_clip"), "coop", class_names=NAMES)
    return vpt.save(model, tmp_path / "prompt.safetensors")


def test_command(tmp_path, cli, artefact):
    code, out, err = cli("export", artefact, "--onnx")
    assert code == 0, err
    assert err == ""
    path = tmp_path / "prompt.onnx"
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    assert out.startswith(f"wrote {path}: {size}, logits within ")
    assert out.endswith(" of torch's\n")
    assert out.count("\n") == 1
    with torch.no_grad():
        expected = vpt.load(artefact)(images(2))
    torch.testing.assert_close(run(path, images(2)), expected, rtol=1e-4, atol=1e-4)


def test_a_backbone_that_the_artefact_cannot_name(tmp_path):
    from vpt.export import load

    model = vpt.attach(backbones.load_tiny_clip(), "linear_probe", class_names=NAMES)
    path = vpt.save(model, tmp_path / "prompt.safetensors")
    again = load(path, ["backbone.name=tiny_clip"])
    assert torch.equal(again.head.weight, model.head.weight)
    with pytest.raises(InputError, match=r"backbone\.name"):
        load(path)


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (["--out", "pets.pt"], "pets.pt: an ONNX file's name ends in .onnx"),
        (["backbone.nam=tiny_clip"], "did you mean 'backbone.name'?"),
        (["data.root=pets"], "unknown key 'data'"),
        (["backbone.name=tiny_clp"], "'tiny_clip'"),
        (["backbone.checkpoint=nowhere.pth"], "nowhere.pth"),
        (["pets.onnx"], "'pets.onnx': not key=value"),
        (["--out", "prompt.safetensors/pets.onnx"], "prompt.safetensors"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, cli, artefact, options, culprit):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("export", artefact, "--onnx", *options)
    assert code == 1
    assert out == ""
    assert err.startswith("vpt: ")
    assert err.count("\n") == 1
    assert culprit in err
    assert list(tmp_path.iterdir()) == [artefact]


def test_a_missing_artefact(tmp_path, cli):
    code, _, err = cli("export", tmp_path / "none.safetensors", "--onnx")
    assert code == 1
    assert err == f"vpt: {tmp_path / 'none.safetensors'}: no such artefact\n"


def test_without_a_format_it_is_wrong_usage(cli, artefact):
    code, out, err = cli("export", artefact)
    assert (code, out) == (2, "")
    assert "--onnx" in err


@pytest.mark.parametrize("missing", ["onnxruntime", "onnxscript"])
def test_without_the_extra_it_says_what_to_install(monkeypatch, cli, artefact, missing):
    monkeypatch.delitem(sys.modules, "vpt.export", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    code, _, err = cli("export", artefact, "--onnx")
    assert code == 1
    assert err == f"vpt: {missing} is not installed: pip install 'visual-prompt-tuning[onnx]'\n"


@pytest.mark.skipif("VPT_REAL_DATA" not in os.environ, reason="VPT_REAL_DATA is not set")
def test_a_real_backbone(tmp_path, cli):
    weights = "vit_tiny_patch16_224.augreg_in21k_ft_in1k.fp16.safetensors"
    checkpoint = Path(os.environ["VPT_REAL_DATA"]) / weights
    backbone = backbones.load("vit_tiny_in21k_ft_in1k", str(checkpoint))
    model = vpt.attach(backbone, "vpt_deep", class_names=NAMES)
    artefact = vpt.save(model, tmp_path / "prompt.safetensors")
    code, out, err = cli("export", artefact, "--onnx", f"backbone.checkpoint={checkpoint}")
    assert (code, err) == (0, "")
    assert out.startswith(f"wrote {tmp_path / 'prompt.onnx'}: 22.")

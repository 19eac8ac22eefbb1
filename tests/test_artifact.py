"""The artefact file: what it holds, and every way in which a wrong one is refused."""

import json

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from tiny import clip, images, vit

import vpt
from vpt import artifact
from vpt.errors import InputError
from vpt.files import write_atomically

NAMES = ["cat", "dog"]


@pytest.fixture
def saved(tmp_path):
    """A model, the artefact of it, and the backbone."""
    backbone = vit()
    model = vpt.attach(backbone, "vpt_deep", class_names=NAMES, num_tokens=3, layers=[1])
    details = {"figures": {"accuracy": 0.5}, "split_hash": "abc"}
    return model, artifact.save(model, tmp_path / "new" / "prompt.safetensors", **details), backbone


def test_round_trip(saved):
    model, path, backbone = saved
    again = vpt.load(path, backbone)
    assert torch.equal(again(images()), model.eval()(images()))
    assert again.artifact_tensors().keys() == {"prompts", "head.weight", "head.bias"}
    assert not again.training
    assert again.tunable_parameters().keys() == model.tunable_parameters().keys()


def test_metadata(saved):
    model, path, _ = saved
    _, metadata = artifact.read(path)
    assert metadata == vpt.load(path, saved[2]).metadata
    assert metadata["method"] == "vpt_deep"
    assert metadata["options"] == model.options.model_dump()
    assert metadata["class_names"] == NAMES
    assert metadata["preprocess"] == model.backbone.preprocess.to_dict()
    assert metadata["backbone"]["fingerprint"] == model.backbone.fingerprint()
    assert metadata["figures"] == {"accuracy": 0.5}
    assert metadata["split_hash"] == "abc"
    assert metadata["version"] == artifact.package_version() != "unknown"


def test_nothing_but_the_file_is_left(saved):
    model, path, _ = saved
    vpt.save(model, path)
    assert [file.name for file in path.parent.iterdir()] == ["prompt.safetensors"]


def test_a_failed_write_keeps_the_old_file(saved):
    model, path, _ = saved
    before = path.read_bytes()
    with pytest.raises(TypeError):
        vpt.save(model, path, figures={1, 2})
    with pytest.raises(TypeError):
        write_atomically(path, "text")
    assert path.read_bytes() == before


def refused(path, message, backbone=None):
    with pytest.raises(InputError, match=message) as caught:
        vpt.load(path, backbone)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_another_backbone_is_refused(saved):
    _, path, backbone = saved
    refused(path, "made for backbone", vit(seed=1))
    refused(path, "made for backbone", clip())
    with torch.no_grad():
        backbone.blocks[0].mlp.fc1.bias[0] += 1e-3
    refused(path, "made for backbone", backbone)


@pytest.mark.parametrize("change", ["activation", "pooling", "heads"])
def test_another_architecture_of_the_same_weights_is_refused(saved, change):
    _, path, _ = saved
    other = vit(num_heads=4) if change == "heads" else vit()
    if change == "pooling":
        other.global_pool = "avg"
    for block in other.blocks if change == "activation" else []:
        block.mlp.act = torch.nn.ReLU()
    refused(path, "another architecture", other)
    known = artifact.read(path)[1]["backbone"]
    known.pop("answer")
    rewrite(path, backbone=known)  # as before artefacts had it
    vpt.load(path, other)


def test_an_unnamed_backbone_must_be_given(saved):
    refused(saved[1], "give backbone=MODEL")


@pytest.mark.parametrize("part", [0, 0.001, 0.1, 0.5, 0.9, 0.9999])
def test_a_truncated_file_is_refused(saved, part):
    _, path, backbone = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    refused(path, "truncated, or not a safetensors file", backbone)


def test_more_bytes_than_written_are_refused(saved):
    _, path, backbone = saved
    path.write_bytes(path.read_bytes() + b"x")
    refused(path, "not a safetensors file", backbone)


def test_every_flipped_byte_is_refused(saved):
    _, path, backbone = saved
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    inside = len(content[:header].rstrip(b" "))  # spaces after it only align the tensors
    for position in [*range(0, inside, 7), *range(header, len(content), 101), len(content) - 1]:
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        refused(path, "truncated|changed|not a prompt artefact", backbone)
    path.write_bytes(content)
    vpt.load(path, backbone)


@pytest.mark.parametrize(
    ("old", "new"), [(b"cat", b"dog"), (b"vpt_deep", b"vpt_dope"), (b"0.5", b"0.9")]
)
def test_changed_metadata_is_refused(saved, old, new):
    _, path, backbone = saved
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    refused(path, "changed since it was written", backbone)


def test_changed_tensors_are_refused(saved):
    _, path, backbone = saved
    tensors = safetensors.torch.load_file(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors["prompts"] = tensors["prompts"].half()
    safetensors.torch.save_file(tensors, path, header)
    refused(path, "changed since it was written", backbone)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "not a safetensors file"),
        (safetensors.torch.save({"a": torch.ones(1)}), "not a prompt artefact"),
        (safetensors.torch.save({"a": torch.ones(1)}, {"x": "y"}), "not a prompt artefact"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "prompt.safetensors"
    path.write_bytes(content)
    refused(path, message)


def test_missing_files_and_folders_are_refused(tmp_path):
    refused(tmp_path / "none.safetensors", "no such artefact")
    refused(tmp_path, "no such artefact")


def rewrite(path, **changes):
    """The artefact as another version of this package would have written it."""
    tensors = safetensors.torch.load_file(path)
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["vpt"])
    text = json.dumps({**metadata, **changes})
    header = {"vpt": text, "sha256": artifact.digest(tensors, text)}
    safetensors.torch.save_file(tensors, path, header)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"options": {"num_tokens": 4, "layers": [1]}}, "tensors are not those"),
        ({"method": "vpt_shallow"}, "layers"),
        ({"method": "vpt_dep"}, "vpt_dep is not one of this package.*vpt_deep"),
        ({"options": {"num_token": 3}}, "num_tokens"),
        ({"class_names": ["a", "b", "c"]}, "tensors are not those"),
    ],
    ids=str,
)
def test_artefacts_of_other_versions_are_refused(saved, changes, message):
    _, path, backbone = saved
    rewrite(path, **changes)
    refused(path, message, backbone)


def test_a_folded_model_is_not_saved(tmp_path):
    model = vpt.attach(vit(), "vpt_deep", num_classes=3)
    with pytest.raises(InputError, match="save the model it is of"):
        vpt.save(model.fold(), tmp_path / "folded.safetensors")
    assert not list(tmp_path.iterdir())

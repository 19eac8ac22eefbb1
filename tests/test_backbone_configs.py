import open_clip
import pytest
import timm
from omegaconf import OmegaConf

from vpt import resources
from vpt.config import BackbonePreset
from vpt.settings import read_yaml, validate

NAMES = resources.names("configs/backbone")
TIMM = set(timm.list_pretrained())
OPEN_CLIP = set(open_clip.list_pretrained())


@pytest.mark.parametrize("stem", NAMES)
def test_names_weights_that_the_installed_libraries_know(stem):
    path = resources.find("configs/backbone", stem)
    values = OmegaConf.to_container(read_yaml(path))
    config = validate(BackbonePreset, values, where=str(path))
    if config.terms:
        assert timm.is_model(config.name)
    elif config.name.startswith("open_clip:hf-hub:"):
        assert config.checkpoint is None
    elif config.checkpoint is None:
        assert config.name == "tiny_clip" or config.name in TIMM
    else:
        assert (config.name, config.checkpoint) in OPEN_CLIP


@pytest.mark.parametrize("stem", NAMES)
def test_holds_one_line_on_size_data_and_licence_then_keys(stem):
    path = resources.find("configs/backbone", stem)
    assert list(read_yaml(path))[:2] == ["name", "checkpoint"]
    first, *others = path.read_text().splitlines()
    assert first.startswith("# ")
    assert "gated" in first
    assert not any(line.startswith("#") for line in others)


def test_no_two_files_name_the_same_weights():
    weights = [str(read_yaml(resources.find("configs/backbone", s))) for s in NAMES]
    assert len(set(weights)) == len(weights)

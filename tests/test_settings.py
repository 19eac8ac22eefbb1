"""Values of settings: texts are taken as they are written, everything else is YAML."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpt.config import DataConfig, RunConfig, load_run, load_suite, to_yaml
from vpt.errors import InputError
from vpt.settings import apply_overrides, override, read_yaml, to_text

WRITTEN = [
    *("pets #2", "007", "2024_01", "yes", "no", "on", "1e5", "2024-01-31", "1:30", "a: b", "[a]"),
    *(
        "{a}",
        "*all",
        "&x",
        "${HOME}",
        "${",
        "'quoted'",
        '"quoted"',
        "true",
        "~/pets",
        "0x10",
        "- a",
    ),
    *("a=b", "é", " padded ", "%x", "@eaDir", "null folder", "!tag x", "|", ">"),
]


@pytest.mark.parametrize("text", WRITTEN)
@pytest.mark.parametrize(
    "key", ["data.root", "out", "engine.feature_cache", "backbone.name", "backbone.checkpoint",
            "data.name"]
)  # fmt: skip
def test_texts_and_paths_are_taken_as_they_are_written(key, text):
    config = load_run("vpt_deep", [f"{key}={text}"])
    section, _, name = key.rpartition(".")
    value = getattr(getattr(config, section) if section else config, name)
    assert str(value) == text
    assert value == type(value)(text)


@pytest.mark.parametrize("text", ["", "null"])
def test_null_and_nothing_are_none_where_that_is_a_value(text):
    config = load_run("vpt_deep", [f"data.root={text}", f"data.shots={text}", f"out={text}"])
    assert (config.data.root, config.data.shots, config.out) == (None, None, None)


@pytest.mark.parametrize("key", ["root", "path"])
def test_texts_of_suites(key):
    assert str(getattr(load_suite("fgvc", [f"{key}=007 #{{}}"]), key)) == "007 #{}"
    assert load_suite("fgvc", ["data=[yes, 007]"]).data == ["yes", "007"]


def test_texts_in_lists_and_keys_in_mappings():
    given = ["data.classes=[yes, no, null, 1e5, 007, 'a, b', \"it's\", 2024-01-31]",
             "data.templates=['a {}', \"{}: #1\"]", "data.exclude=*_mask*",
             "decision.sensitivity={yes: 0.9, 007: 0.8}"]  # fmt: skip
    config = load_run("vpt_deep", given)
    assert config.data.classes == ["yes", "no", "null", "1e5", "007", "a, b", "it's", "2024-01-31"]
    assert config.data.templates == ["a {}", "{}: #1"]
    assert config.data.exclude == ["*_mask*"]
    assert config.decision.sensitivity == {"yes": 0.9, "007": 0.8}
    assert load_run("vpt_deep", ["data.classes=null"]).data.classes is None


@pytest.mark.parametrize("text", ["a #1", "yes", "007", "2024-01-31", "a photo of a"])
def test_texts_of_a_method(text):
    assert load_run("coop", [f"method.init={text}"]).method.options["init"] == text
    assert load_run("coop", [f"method.init='{text}'"]).method.options["init"] == text


def test_other_values_are_yaml():
    changes = ["method.layers=[0, 1]", "train.lr=1e-3", "data.shots=4", "engine.compile=true"]
    config = load_run("vpt_deep", [*changes, "method.dropout=.5"])
    assert config.method.options["layers"] == [0, 1]
    assert config.method.options["dropout"] == 0.5
    assert (config.train.lr, config.data.shots, config.engine.compile) == (0.001, 4, True)


@pytest.mark.parametrize(
    ("overrides", "culprits"),
    [
        (["data.classes=[a"], ["data.classes=[a", "not YAML", "quotes"]),
        (["data.exclude=[*a,'b']"], ["data.exclude=[*a,'b']", "quotes"]),
        (["train.lr=1", "train.lr.x=2"], ["train.lr.x=2", "drop one"]),
        (["data=5"], ["data=5"]),
    ],
    ids=str,
)
def test_what_cannot_be_read(overrides, culprits):
    with pytest.raises(InputError) as caught:
        load_run("vpt_deep", overrides)
    assert "\n" not in str(caught.value)
    for culprit in culprits:
        assert culprit in str(caught.value)


# no interpolations, which a file may have
NAMES = st.lists(
    st.sampled_from(["yes", "no", "null", "1e5", "007", "a, b", "v1.5", "it's", 'say "x"', "[a]",
                     "{b}", "a: b", "#1", "$HOME", "`x`", "é", "~", "", " x ", "*"])
    | st.text(min_size=1, max_size=12).filter(lambda text: "${" not in text),
    min_size=1, max_size=5,
)  # fmt: skip


@given(NAMES)
def test_a_list_that_is_printed_can_be_pasted(names):
    (pasted,) = shlex.split(override("data.classes", names))
    values = apply_overrides(RunConfig, {"data": {"classes": ["x"]}}, [pasted])
    assert values == {"data": {"classes": names}}


def test_simple_lists_are_printed_plainly():
    assert override("data.classes", ["cat", "dog_2"]) == "data.classes=[cat,dog_2]"
    assert override("data.classes", ["a b", "c"]) == "'data.classes=[a b,c]'"


def test_files_are_read_like_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "backbone: {name: tiny_clip}\nmethod: {name: vpt_deep, dropout: 1e-1}\n"
        "data: {root: 007, classes: [yes, no, 007, 2024_01, 2024-01-31], shots: 4}\n"
        "out: 2024_01\ntrain: {lr: 1e-3}\n"
    )
    config = load_run(str(path))
    assert (str(config.data.root), str(config.out)) == ("007", "2024_01")
    assert config.data.classes == ["yes", "no", "007", "2024_01", "2024-01-31"]
    assert (config.train.lr, config.data.shots, config.method.options["dropout"]) == (0.001, 4, 0.1)


@given(NAMES)
def test_written_values_are_read_as_they_were(tmp_path_factory, names):
    values = DataConfig(root="007", classes=names).model_dump(mode="json")
    path = tmp_path_factory.mktemp("settings") / "data.yaml"
    path.write_text(to_text(values), encoding="utf-8")
    assert dict(read_yaml(path)) == values


def test_a_saved_run_keeps_its_texts(tmp_path):
    config = load_run("vpt_deep", ["data.root=pets #2", "out=007", "data.classes=[yes, 1e5]"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_run(str(tmp_path / "config.yaml")) == config
    assert read_yaml(tmp_path / "config.yaml").data.root == "pets #2"


def test_plain_lists_of_texts_are_taken_as_they_are_written():
    config = load_run(
        "vpt_deep", ["data.exclude=[old,*.bmp, @x]", "data.classes=[a: b, no #1,007]"]
    )
    assert config.data.exclude == ["old", "*.bmp", "@x"]
    assert config.data.classes == ["a: b", "no #1", "007"]

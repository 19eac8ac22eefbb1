"""Run configurations: every file in configs/, overrides, and what is wrong with bad ones."""

import pytest
from pydantic import BaseModel
from stored import FOLDER

import vpt
from vpt import methods, resources
from vpt.config import RunConfig, Strict, TrainConfig, kind_of, load_run, to_yaml
from vpt.errors import InputError
from vpt.run import check_method
from vpt.settings import read_yaml

RUNS = [name for name in resources.names("configs/run") if kind_of(name) is None]
METHODS = methods.names()


@pytest.mark.parametrize("name", RUNS)
def test_every_run_config_is_valid(name):
    config = load_run(name)
    check_method(config)
    assert config.backbone.name in resources.names("configs/backbone")
    path = resources.find("configs/run", name)
    assert path.read_text().startswith("# ")
    assert load_run(str(path)) == config


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_recipe_and_a_run_config(name):
    recipe = read_yaml(resources.find("configs/method", name))
    assert recipe.method.name == name
    assert set(recipe) <= {"method", "train", "data"}
    assert load_run(name).method.name == name


def test_every_recipe_has_a_method():
    assert resources.names("configs/method") == METHODS


def test_the_recipe_comes_first_then_the_file_then_the_overrides(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "backbone: {name: tiny_clip}\nmethod: {name: vpt_deep, num_tokens: 3}\n"
        "train: {epochs: 7, lr: 0.5}\n"
    )
    config = load_run(str(path), ["train.lr=0.25", "method.layers=[0, 1]", "data.shots=null"])
    recipe = read_yaml(resources.find("configs/method", "vpt_deep"))
    assert config.train.batch_size == 32
    assert config.train.warmup_epochs == recipe.train.warmup_epochs
    own = {key: value for key, value in recipe.method.items() if key != "name"}
    assert config.method.options == own | {"num_tokens": 3, "layers": [0, 1]}
    assert (config.train.epochs, config.train.lr, config.data.shots) == (7, 0.25, None)


@pytest.mark.parametrize("name", resources.names("configs/paper"))
def test_a_published_recipe_replaces_the_default(name, tmp_path):
    config = load_run(name, ["recipe=paper"])
    if "head" in methods.find(config.method.name).Options.model_fields:
        assert config.method.options["head"] == "random"
    assert (config.train.optimizer, config.train.folds) == ("sgd", None)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_run(str(tmp_path / "config.yaml")) == config


def test_a_recipe_that_a_method_does_not_have():
    with pytest.raises(InputError, match="no 'coop' in configs/paper"):
        load_run("coop", ["recipe=paper"])
    with pytest.raises(InputError, match="recipe='papre'"):
        load_run("vpt_deep", ["recipe=papre"])


def test_another_method_brings_its_own_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "backbone: {name: tiny_clip}\nmethod: {name: vpt_deep, num_tokens: 3}\n"
        "data: {shots: 2}\ntrain: {epochs: 7}\n"
        "expected: {accuracy: 0.5, within: 0.1, measured_on: a laptop}\n"
    )
    same = load_run(str(path), ["method.name=vpt_deep"])
    assert same == load_run(str(path))
    assert same.expected.accuracy == 0.5
    config = load_run(str(path), ["method.name=coop", "train.lr=0.5"])
    coop = load_run("coop")
    assert config.method == coop.method
    assert config.train == coop.train.model_copy(update={"lr": 0.5})
    assert config.expected is None
    assert config.data.shots == 2


@pytest.mark.parametrize(
    ("overrides", "culprits"),
    [
        (["data.shot=4"], ["'data.shot'", "'data.shots'"]),
        (["dta.shots=4"], ["'dta'", "'data'"]),
        (["train.learning_rate=1"], ["'train.learning_rate'", "lr"]),
        (["method.name=vpt_dep"], ["'vpt_dep'", "'vpt_deep'"]),
        (["method.name=5"], ["no '5' in configs/method"]),
        (["method.name="], ["method.name"]),
        (["data.shots=many"], ["data.shots", "'many'", "integer"]),
        (["data.shots=0"], ["data.shots=0", "greater than 0"]),
        (["train.lr=-1"], ["train.lr=-1", "greater than 0"]),
        (["train.lr=nan"], ["train.lr"]),
        (["train.lr=.inf"], ["train.lr"]),
        (["train.lr=fast"], ["train.lr", "'fast'", "number"]),
        (["train.epochs=2.5"], ["train.epochs=2.5", "integer"]),
        (["train.epochs=null"], ["train.epochs=None"]),
        (["train.optimizer=adam"], ["train.optimizer", "'adam'", "adamw"]),
        (["train.momentum=1"], ["train.momentum=1", "less than 1"]),
        (["train.seed=-1"], ["train.seed=-1"]),
        (["data.seed=-1"], ["data.seed=-1"]),
        (["data.augment=flip"], ["data.augment", "'flip'", "crop_flip"]),
        (["data=5"], ["data"]),
        (["train.lr"], ["'train.lr'", "key=value"]),
        (["=3"], ["'=3'", "key=value"]),
        (["data.classes=[a"], ["data.classes"]),
        (["data.windows=lung"], ["data.windows='lung': not a list: give data.windows=[lung]"]),
        (["data.windows=[lung]"], ["data.windows=['lung']", "at least 3 items", "not 1"]),
        (["data.templates=a {}, é"], ["give 'data.templates=[\"a {}, é\"]'"]),
        (["data.classes=7"], ["data.classes='7': not a list: give data.classes=[7]"]),
        (["train.lr=1", "train.lr.x=2"], ["train.lr"]),
    ],
    ids=str,
)
def test_a_bad_override_is_one_line_that_names_it(overrides, culprits):
    with pytest.raises(InputError) as caught:
        load_run("vpt_deep", overrides)
    assert "\n" not in str(caught.value)
    for culprit in culprits:
        assert culprit in str(caught.value)


@pytest.mark.parametrize(
    ("options", "culprits"),
    [
        ({"num_token": 3}, ["method vpt_deep", "'num_token'", "'num_tokens'"]),
        ({"num_tokens": 0}, ["num_tokens=0", "greater than 0"]),
        ({"num_tokens": "ten"}, ["num_tokens='ten'", "integer"]),
        ({"dropout": 1}, ["dropout=1", "less than 1"]),
        ({"position": "middle"}, ["position='middle'", "prepend"]),
        ({"layers": 3}, ["layers=3: not a list: give layers=[3]"]),
    ],
    ids=str,
)
def test_a_bad_method_option_is_one_line_that_names_it(options, culprits):
    with pytest.raises(InputError) as caught:
        methods.check_options("vpt_deep", options)
    assert "\n" not in str(caught.value)
    for culprit in culprits:
        assert culprit in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("a: 1\na: 2", "not YAML"),
        ("- a\n- b", "not a mapping"),
        ("hello", "not a mapping"),
        ("5", "not a mapping"),
        ("", "method.name is missing"),
        ("method: {name: vpt_deep}", "backbone is missing"),
        ("backbone: {}\nmethod: {name: vpt_deep}", "backbone.name is missing"),
        ("backbone: {name: tiny_clip}\nmethod: vpt_deep", "method"),
        ("backbone: {name: tiny_clip}\nmethod: [vpt_deep]", "method"),
        ("a: \xff", "not YAML"),
    ],
    ids=repr,
)
def test_a_bad_file_is_named_in_one_line(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message) as caught:
        load_run(str(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vpt_dep", "'vpt_dep'.*'vpt_deep'"),
        ("nowhere/run.yaml", "nowhere/run.yaml: no such file"),
    ],
)
def test_a_missing_file_is_named(name, message):
    with pytest.raises(InputError, match=message):
        load_run(name)


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "run.yaml").mkdir()
    with pytest.raises(InputError, match=r"run\.yaml"):
        load_run(str(tmp_path / "run.yaml"))


CHANGES = {
    "backbone.name": "tiny_clip",
    "backbone.checkpoint": "weights.safetensors",
    "data.name": "digits",
    "data.root": "images",
    "data.shots": "2",
    "data.sampling": "natural",
    "data.seed": "5",
    "data.split": "train-val",
    "data.classes": "[a, b]",
    "data.templates": "['a {}']",
    "data.class_half": "base",
    "data.shots_per": "patient",
    "data.calibration": "0.25",
    "data.augment": "crop",
    "data.exclude": "old",
    "data.skip_broken": "true",
    "data.include": "[a, b]",
    "data.windows": "[lung, bone, brain]",
    "data.workers": "2",
    "data.duplicates": "stop",
    "method.name": "vpt_shallow",
    "method.num_tokens": "3",
    "method.layers": "[0]",
    "train.epochs": "7",
    "train.min_steps": "5",
    "train.batch_size": "5",
    "train.optimizer": "sgd",
    "train.lr": "0.5",
    "train.weight_decay": "0.5",
    "train.momentum": "0.5",
    "train.eps": "0.5",
    "train.schedule": "constant",
    "train.warmup_epochs": "2",
    "train.warmup_lr": "0.5",
    "train.loss": "logit_adjusted",
    "train.precision": "bf16",
    "train.folds": "2",
    "train.views": "5",
    "recipe": "paper",
    "train.seed": "5",
    "decision.temperature": "true",
    "decision.sensitivity": "{cat: 0.9}",
    "decision.specificity": "{cat: 0.9}",
    "decision.alpha": "0.1",
    "decision.coverage": "0.9",
    "auto": "{minutes: 5}",
    "engine.exact_tokens": "true",
    "engine.compile": "true",
    "engine.checkpointing": "true",
    "engine.feature_cache": "features",
    "tests": "{new: {class_half: new}}",
    "tasks": "{pets: {root: pets}}",
    "init_from": str(FOLDER / "vpt_deep_vit.safetensors"),
    "out": "elsewhere",
    "expected": "{accuracy: 0.5, within: 0.1, measured_on: a laptop}",
}

NOT_HASHED = {"data.workers", "data.duplicates", "engine.feature_cache"}


def keys(model, prefix=""):
    for name, field in model.model_fields.items():
        kind = field.annotation
        nested = isinstance(kind, type) and issubclass(kind, BaseModel)
        yield from keys(kind, f"{prefix}{name}.") if nested else [prefix + name]


def test_the_changes_cover_every_setting():
    assert set(keys(RunConfig)) | {"method.num_tokens", "method.layers"} == set(CHANGES)


@pytest.mark.parametrize("key", CHANGES)
def test_the_hash_changes_with_what_can_change_the_result(key):
    name = "auto" if key == "auto" else "vpt_deep"
    plain = load_run(name)
    changed = load_run(name, [f"{key}={CHANGES[key]}"])
    assert changed != plain
    same = key in {*NOT_HASHED, "tests", "out", "expected"}
    assert (changed.hash == plain.hash) == same


def test_a_saved_configuration_repeats_the_run(tmp_path):
    config = load_run(
        "vpt_deep",
        ["method.layers=[0, 1]", "data.classes=[a, b]", "data.root=images", "out=here"],
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = load_run(str(tmp_path / "config.yaml"))
    assert again == config
    assert again.hash == config.hash


def test_the_recipe_of_the_paper():
    options, config = vpt.recipe("vpt_deep", "paper")
    assert options == {"num_tokens": 10, "dropout": 0.1, "head": "random"}
    assert (config.optimizer, config.epochs, config.folds) == ("sgd", 100, None)
    with pytest.raises(vpt.InputError, match="coop"):
        vpt.recipe("coop", "paper")
    with pytest.raises(vpt.InputError, match="give default or paper"):
        vpt.recipe("vpt_deep", "papr")
    with pytest.raises(vpt.InputError, match="vpt_deep"):
        vpt.recipe("vpt_depe")


def test_a_neutral_new_key_keeps_the_hash():
    class Train(TrainConfig):
        teacher: str | None = None

    class Stream(Strict):
        tasks: int = 1
        strategy: str = "sequential"

    class Later(RunConfig):
        train: Train = Train()
        stream: Stream = Stream()
        shards: int = 1

    def changed(**sections):
        values = load_run("vpt_deep").model_dump()
        return Later.model_validate({**values, **sections}).hash

    plain = load_run("vpt_deep")
    train = plain.train.model_dump()
    assert changed() == changed(train={**train, "teacher": None}) == plain.hash
    assert changed(stream={"tasks": 1}) == changed(shards=1) == plain.hash
    others = [
        changed(train={**train, "teacher": "a"}),
        changed(stream={"tasks": 5}),
        changed(stream={"tasks": 5, "strategy": "joint"}),
        changed(shards=2),
    ]
    assert len({plain.hash, *others}) == 5

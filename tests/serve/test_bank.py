"""Many tasks in one batch: as one by one, whatever their methods, neighbours and order."""

import functools
import gc
import threading

import pytest
import tiny
import torch

import vpt
from vpt.serve import bank as bank_module

same = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
BACKBONES = {"vit": tiny.vit, "clip": tiny.clip}
CLASSES = [["cat", "dog"], tiny.NAMES, ["a", "b", "c", "d", "e"]]


def artefact(backbone, method, path, number=0, decision=None, **options):
    """An artefact of `method` in which nothing is at its start, another for each number."""
    names = CLASSES[number % len(CLASSES)]
    model = tiny.attach(backbone, method, class_names=names, **options)
    labels = torch.arange(2 * len(names)) % len(names)
    pictures = pictures_of(len(labels), number)
    if model.solved:
        with torch.no_grad():
            features = model.features(pictures)
        model.solve(features, labels)
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.tunable_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    details = {"decision": decision} if decision else {}
    return vpt.save(model, path / f"{method}-{number}.safetensors", **details)


def pictures_of(count, seed=1):
    return tiny.images(count, seed).to(torch.get_default_dtype())


def answers(backbone, paths, pictures):
    """Logits of each picture by its task's own model, by name."""
    backbone = vpt.backbones.adapt(backbone)
    pairs = zip(paths.items(), pictures, strict=True)
    with torch.no_grad():
        return {n: vpt.load(p, backbone).fold()(image[None])[0] for (n, p), image in pairs}


@pytest.fixture(scope="module", params=BACKBONES)
def everything(request, tmp_path_factory):
    """A backbone, and three artefacts of every method on it: two alike, one of other options."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.set_default_dtype(torch.float64)
    backbone = vpt.backbones.adapt(BACKBONES[request.param]())
    names = [m for m, kind in tiny.pairs(request.param)]
    paths = {}
    for method in names:
        for number in (0, 3, 1):
            paths[f"{method}-{number}"] = artefact(backbone, method, folder, number)
    for count, layers in ((3, [1]), (5, [0])):
        name = f"vpt_deep-{9 + count}"
        paths[name] = artefact(
            backbone, "vpt_deep", folder, 9 + count, num_tokens=count, layers=layers
        )
    paths["vpt_shallow-9"] = artefact(backbone, "vpt_shallow", folder, 9, gated=True)
    if request.param == "clip":  # alike but for what no tensor says
        paths["tip_adapter-6"] = artefact(backbone, "tip_adapter", folder, 6, alpha=3.0)
        paths["coop-6"] = artefact(backbone, "coop", folder, 6, multilabel=True)
        paths["zero_shot-6"] = artefact(backbone, "zero_shot", folder, 6, templates=["one {}."])
    yield backbone, paths
    torch.set_default_dtype(torch.float32)


def make(backbone, paths, **options):
    bank = vpt.PromptBank(backbone, **options)
    for name, path in paths.items():
        bank.add(name, path)
    return bank


def test_every_method_in_one_batch_is_as_by_itself(everything):
    backbone, paths = everything
    bank = make(backbone, paths)
    pictures = pictures_of(len(paths))
    expected = answers(backbone, paths, pictures)
    together = dict(zip(paths, bank(pictures, list(paths)), strict=True))
    back = bank(pictures.flip(0), list(reversed(paths)))
    for name, logits in expected.items():
        same(together[name], logits, msg=lambda text, name=name: f"{name}: {text}")
    for name, logits in zip(reversed(paths), back, strict=True):
        same(logits, expected[name])


def test_tasks_that_differ_in_values_alone_are_read_out_together(everything, monkeypatch):
    backbone, paths = everything
    sizes, real = [], bank_module.read_out
    monkeypatch.setattr(
        bank_module, "read_out", lambda tasks, *rest: sizes.append(len(tasks)) or real(tasks, *rest)
    )
    bank = make(backbone, paths)
    methods = {name.rpartition("-")[0] for name in paths}
    shared = set()
    for method in methods:
        del sizes[:]
        bank(pictures_of(2), [f"{method}-0", f"{method}-3"])
        if sizes:  # else other weights, pixels or a reading of its own: a pass by itself
            shared.add(method)
            assert sizes == ([1, 1] if method == "cocoop" else [2]), method
    assert shared >= {"vpt_deep", "vpt_shallow", "kv_prompts", "linear_probe"}
    assert shared >= {"coop", "maple", "tip_adapter"} & methods


def test_a_samples_logits_do_not_depend_on_its_mates(everything):
    backbone, paths = everything
    bank = make(backbone, paths)
    pictures = pictures_of(len(paths))
    together = bank(pictures, list(paths))
    for name, image, logits in zip(paths, pictures, together, strict=True):
        same(logits, bank(image[None], [name])[0])


def test_tasks_of_one_method_together_are_as_by_themselves(everything):
    backbone, paths = everything
    bank = make(backbone, paths)
    pictures = pictures_of(5)
    for method in {name.rpartition("-")[0] for name in paths}:
        names = [f"{method}-{number}" for number in (0, 3, 3, 0, 3)]
        together = bank(pictures, names)
        alone = [bank(image[None], [name])[0] for name, image in zip(names, pictures, strict=True)]
        for one, other in zip(together, alone, strict=True):
            same(one, other)


def test_several_tasks_of_one_image(everything):
    backbone, paths = everything
    bank = make(backbone, paths)
    pictures, names = pictures_of(2), list(paths)
    first, second = bank(pictures, [names, names[0]])
    for name, logits in zip(names, first, strict=True):
        same(logits, bank(pictures[:1], [name])[0])
    same(second, bank(pictures[1:], names[:1])[0])


@pytest.fixture
def backbone():
    return vpt.backbones.adapt(tiny.vit())


def ran(bank, monkeypatch):
    """Sizes of the batches that pass the embedding, and each block."""
    sizes, embed, block = [], bank.backbone.embed, bank.backbone.block

    def embedded(images):
        sizes.append(len(images))
        return embed(images)

    def passed(index, tokens, *rest):
        sizes.append(len(tokens))
        return block(index, tokens, *rest)

    monkeypatch.setattr(bank.backbone, "embed", embedded)
    monkeypatch.setattr(bank.backbone, "block", passed)
    return sizes


def test_an_image_is_embedded_once_and_blocks_before_prompts_run_once(
    backbone, tmp_path, monkeypatch
):
    bank = vpt.PromptBank(backbone)
    for number in (0, 3):
        path = artefact(backbone, "vpt_deep", tmp_path, number, layers=[1])
        bank.add(f"late{number}", path)
        bank.add(f"probe{number}", artefact(backbone, "linear_probe", tmp_path, number))
    sizes = ran(bank, monkeypatch)
    bank(tiny.images(2), [list(bank), ["late0", "late0", "late3"]])
    assert sizes == [2, 2, 5]  # the image with probes runs once without prompts
    del sizes[:]
    bank(tiny.images(2), [["probe0", "probe3"], "probe3"])
    assert sizes == [2, 2, 2]


def test_blocks_of_an_unknown_kind_run_too(backbone, tmp_path):
    class Block(type(backbone.model.blocks[0])):
        pass

    model = tiny.vit()
    model.blocks[1].__class__ = Block
    backbone = vpt.backbones.adapt(model)
    assert not backbone.knows_rows
    paths = {
        f"{method}{number}": artefact(backbone, method, tmp_path, number)
        for method in ("vpt_deep", "vpt_shallow", "linear_probe")
        for number in (0, 1)
    }
    bank, pictures = make(backbone, paths), tiny.images(len(paths))
    together = bank(pictures, list(paths))
    for logits, expected in zip(together, answers(backbone, paths, pictures).values(), strict=True):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_answered_is_one_line(backbone, tmp_path):
    bank = vpt.PromptBank(backbone)
    with pytest.raises(vpt.InputError, match=r"no task 'x': the bank is empty$"):
        bank(tiny.images(1), ["x"])
    path = artefact(backbone, "vpt_deep", tmp_path)
    bank.add("radiology", path)
    for act in (bank.task, bank.remove, bank.load, lambda name: bank(tiny.images(1), [name])):
        with pytest.raises(vpt.InputError, match="no task 'radiolgy'; did you mean 'radiology'"):
            act("radiolgy")
    with pytest.raises(vpt.InputError, match="task radiology: already in the bank"):
        bank.add("radiology", path)
    with pytest.raises(vpt.InputError, match="2 images, but 1 tasks"):
        bank(tiny.images(2), ["radiology"])
    other = artefact(tiny.vit(seed=1), "vpt_deep", tmp_path, 1)
    for act in (bank.add, bank.replace):
        with pytest.raises(vpt.InputError, match="made for backbone unnamed with fingerprint"):
            act("radiology" if act == bank.replace else "other", other)
    assert list(bank) == ["radiology"]
    squashed = vpt.backbones.adapt(backbone)
    squashed.preprocess = backbone.preprocess.model_copy(update={"crop_mode": "squash"})
    model = tiny.attach(squashed)
    with pytest.raises(vpt.InputError, match="another preprocessing"):
        bank.add("squashed", vpt.save(model, tmp_path / "squashed.safetensors"))
    squashed.preprocess = backbone.preprocess.model_copy(update={"grey_range": (0, 4095)})
    model = tiny.attach(squashed)
    bank.add("grey", vpt.save(model, tmp_path / "grey.safetensors"))
    assert bank.task("grey").metadata["preprocess"]["grey_range"] == [0, 4095]


def test_a_task_is_loaded_when_it_is_asked_for(backbone, tmp_path):
    path = artefact(backbone, "vpt_deep", tmp_path, decision={"temperature": 2.0})
    bank = make(backbone, {"lazy": path})
    bank.add("pinned", path, pinned=True)
    one = bank.num_bytes
    assert one > 0
    assert len(bank) == 2
    task = bank.task("lazy")
    assert (task.class_names, task.target.name) == (CLASSES[0], "multiclass")
    assert task.metadata["method"] == "vpt_deep"
    bank(tiny.images(1), ["lazy"])
    assert bank.num_bytes == 2 * one
    bank.remove("lazy")
    assert bank.num_bytes == one
    assert "lazy" not in bank


def test_the_task_asked_for_longest_ago_is_forgotten_and_a_pinned_one_is_kept(backbone, tmp_path):
    paths = {str(n): artefact(backbone, "vpt_deep", tmp_path, 3 * n) for n in range(4)}
    one = make(backbone, paths)
    one.load("0")
    bank = vpt.PromptBank(backbone, max_bytes=3 * one.num_bytes)
    for name, path in paths.items():
        bank.add(name, path, pinned=name == "0")
    read = []
    real = vpt.artifact.read
    pictures = tiny.images(4)
    expected = answers(backbone, paths, pictures)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vpt.artifact.read", lambda path: read.append(path) or real(path))
        for names in (["1", "2"], ["1"], ["3"], ["0", "1"], ["2"], ["3", "2", "1", "0"]):
            for name, logits in zip(
                names, bank(pictures[[int(n) for n in names]], names), strict=True
            ):
                torch.testing.assert_close(logits, expected[name], rtol=1e-5, atol=1e-5)
            assert bank.num_bytes <= bank.max_bytes
    asked = [next(n for n, p in paths.items() if p == path) for path in read]
    assert asked == ["1", "2", "3", "2", "3"]  # not "0", pinned, nor "1", asked for again


def test_a_replaced_task_answers_by_the_old_artefact_or_by_the_new_one(backbone, tmp_path):
    old, new = (artefact(backbone, "vpt_deep", tmp_path, number) for number in (0, 3))
    picture = tiny.images(1)
    possible = [answers(backbone, {"": path}, picture)[""] for path in (old, new)]
    bank = make(backbone, {"task": old, "other": new})
    stop, failed = threading.Event(), []

    def ask():
        while not stop.is_set():
            logits = bank(picture, [["task", "other"]])[0][0]
            failed.extend([logits] * (not any(torch.allclose(logits, p) for p in possible)))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(20):
        bank.replace("task", (new, old)[number % 2])
    bank.replace("task", new)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed
    torch.testing.assert_close(bank(picture, ["task"])[0], possible[1])


def test_a_file_that_was_changed_unseen_is_refused(backbone, tmp_path):
    path = artefact(backbone, "vpt_deep", tmp_path)
    bank = make(backbone, {"task": path})
    artefact(backbone, "vpt_deep", tmp_path, num_tokens=3)
    with pytest.raises(vpt.InputError, match="changed since task task was added: replace it"):
        bank(tiny.images(1), ["task"])
    bank.replace("task", path)
    assert len(bank(tiny.images(1), ["task"])[0]) == 2


def test_the_backbones_weights_are_in_memory_once_for_a_thousand_tasks(backbone, tmp_path):
    path = artefact(backbone, "vpt_deep", tmp_path, num_tokens=2)
    bank = make(backbone, {str(number): path for number in range(1000)})
    before = live_tensors()
    for name in bank:
        bank.load(name)
    new = [tensor for key, tensor in live_tensors().items() if key not in before]
    parts = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in new}
    for tensor in backbone.state_dict().values():
        parts.pop(tensor.untyped_storage().data_ptr(), None)
    assert sum(part.nbytes() for part in parts.values()) <= 1.01 * bank.num_bytes
    assert bank.num_bytes < 1000 * 2 * path.stat().st_size
    logits = bank(tiny.images(1).expand(1000, -1, -1, -1), list(bank))
    torch.testing.assert_close(torch.stack(logits), logits[0].expand(1000, -1), rtol=0, atol=1e-5)


def live_tensors():
    """All tensors of this process, by their id."""
    gc.collect()
    return {id(each): each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)}

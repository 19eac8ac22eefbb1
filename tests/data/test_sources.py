import hashlib
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from medmnist import INFO
from PIL import Image

from vpt.config import DataConfig
from vpt.data import sources
from vpt.data.cards import Card, load_card
from vpt.data.sources import open_source
from vpt.errors import InputError


def draw(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), "red").save(path)


def class_folders(root, classes, per_class=2):
    draw(*(root / name / f"{i}.png" for name in classes for i in range(per_class)))


def opened(root=None, **options):
    return open_source(DataConfig(root=root, **options))


def refused(match, root=None, **options):
    with pytest.raises(InputError, match=match) as caught:
        opened(root, **options)
    assert "\n" not in str(caught.value)


def test_needs_no_torch():
    code = "import vpt.data.cards, vpt.data.sources, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_digits():
    source = opened(name="digits")
    samples = source.parts["all"]
    assert source.class_names[:2] == ["zero", "one"] and len(source.class_names) == 10
    assert samples.images.shape == (1797, 8, 8) and samples.images.dtype == np.uint8
    assert np.unique(samples.images)[[0, 1, 7, 16]].tolist() == [0, 16, 112, 255]  # rounded
    assert samples.names[17] == "all/17" and samples.labels.dtype == np.int64
    refused("reads no files", Path("x"), name="digits")


# folder


def test_folder_of_classes(tmp_path):
    class_folders(tmp_path, ["b", "B c", "10", "9"])
    draw(tmp_path / "b/deeper/x.JPG", tmp_path / ".hidden/x.png", tmp_path / "__MACOSX/x.png")
    source = opened(tmp_path)
    assert (source.name, source.class_names) == ("folder", ["10", "9", "B c", "b"])
    samples = source.parts["all"]
    assert samples.names[-3:] == ["b/0.png", "b/1.png", "b/deeper/x.JPG"]
    assert samples.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert samples.images[0] == tmp_path / "10/0.png"


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_folder_of_parts(tmp_path, val):
    for part in ("train", val, "test"):
        class_folders(tmp_path / part, ["a", "b"])
    source = opened(tmp_path)
    assert set(source.parts) == {"train", "val", "test"}
    assert source.parts["val"].names[0] == f"{val}/a/0.png"


def test_train_without_test_has_no_split(tmp_path):
    class_folders(tmp_path / "train", ["a", "b"])
    assert opened(tmp_path).parts.keys() == {"all"}


def test_train_and_val_alone_hold_out_val(tmp_path):
    for part in ("train", "val"):
        class_folders(tmp_path / part, ["a", "b"])
    parts = opened(tmp_path).parts
    assert parts.keys() == {"train", "test"} and parts["test"].names[0] == "val/a/0.png"
    class_folders(tmp_path / "valid", ["a", "b"])
    refused("two folders for one part, train, val, valid", tmp_path)


def test_a_class_may_be_called_test(tmp_path):
    class_folders(tmp_path, ["control", "test"])
    assert opened(tmp_path).class_names == ["control", "test"]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    class_folders(tmp_path / "x", ["a", "b"])
    assert opened(Path("~/x")).class_names == ["a", "b"]


def test_bad_folders(tmp_path):
    refused("data.root=.*nowhere: no such", tmp_path / "nowhere")
    refused("give data.root=PATH")
    (tmp_path / "flat").mkdir()
    refused("flat: no class folders", tmp_path / "flat")
    draw(tmp_path / "flat/1.png")
    refused("flat: the images lie directly in it", tmp_path / "flat")
    class_folders(tmp_path / "one", ["only"])
    refused("only one class, 'only'", tmp_path / "one")
    class_folders(tmp_path / "hole", ["a", "b"])
    (tmp_path / "hole/empty").mkdir()
    refused("hole/empty: class folder without images", tmp_path / "hole")
    class_folders(tmp_path / "differ/train", ["a", "b", "c"])
    class_folders(tmp_path / "differ/test", ["a", "b", "d"])
    refused("train and test differ: only one of them has c, d", tmp_path / "differ")
    class_folders(tmp_path / "tests/test", ["a", "b"])
    refused("test/ but no train/", tmp_path / "tests")
    draw(tmp_path / "file.png")
    refused("not a folder, .csv or .npz", tmp_path / "file.png")
    refused("name=folder expects a folder, not a .png", tmp_path / "file.png",
            name="folder")  # fmt: skip


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Training", "Validation", "Testing"),
        ("TRAIN", "dev", "Test"),
        ("train_set", "eval", "test-set"),
        ("1_train", "2_valid", "3_test"),
        ("train images", "val images", "holdout"),
        ("trn", "Val_Split", "hold-out"),
    ],
)
def test_parts_are_known_by_their_usual_spellings(tmp_path, train, val, test):
    for part in (train, val, test):
        class_folders(tmp_path / part, ["a", "b"])
    parts = opened(tmp_path).parts
    firsts = {part: samples.names[0].partition("/")[0] for part, samples in parts.items()}
    assert firsts == {"train": train, "val": val, "test": test}


def test_train_and_dev_alone_hold_out_dev(tmp_path):
    for part in ("train", "dev"):
        class_folders(tmp_path / part, ["a", "b"])
    parts = opened(tmp_path).parts
    assert {part: samples.names[0] for part, samples in parts.items()} == {
        "train": "train/a/0.png",
        "test": "dev/a/0.png",
    }


def test_folders_that_may_be_parts_are_refused(tmp_path):
    for part in ("trian", "test"):
        class_folders(tmp_path / "typo" / part, ["a", "b"])
    draw(tmp_path / "typo/test/flat.png")
    refused("folders test, trian all hold the folders a, b: call them train", tmp_path / "typo")
    for part in ("train", "test", "extra"):
        class_folders(tmp_path / "more" / part, ["a", "b"])
    refused("extra/ holds classes of train/, but is no part: call it", tmp_path / "more")
    source = opened(tmp_path / "more", exclude=["extra"])
    assert source.parts.keys() == {"train", "test"}
    assert source.left_out == {"excluded by extra": 4}


def test_parts_of_unknown_spelling_are_refused_though_deeper_or_without_a_class(tmp_path):
    for part in ("seg_train", "seg_test"):
        class_folders(tmp_path / "deep" / part / part, ["a", "b"])
    refused("seg_test, seg_train all hold the folders a, b", tmp_path / "deep")
    class_folders(tmp_path / "lacks/my_train", ["a", "b", "c"])
    class_folders(tmp_path / "lacks/my_test", ["a", "b"])
    refused("my_test, my_train all hold the folders a, b", tmp_path / "lacks")
    class_folders(tmp_path / "patients/benign", ["1", "2", "3"])
    class_folders(tmp_path / "patients/malignant", ["1", "2"])
    assert opened(tmp_path / "patients").class_names == ["benign", "malignant"]


def test_a_class_may_hold_folders_of_its_own(tmp_path):
    for name in ("cat/left/1", "cat/right/2", "dog/left/3", "dog/4"):
        draw(tmp_path / f"{name}.png")
    assert opened(tmp_path).parts["all"].labels.tolist() == [0, 0, 1, 1]


def test_what_is_left_out_of_a_folder_is_kept_by_kind_and_number(tmp_path):
    for part in ("train", "test"):
        class_folders(tmp_path / part, ["a", "b"])
    class_folders(tmp_path / "train", ["@eaDir", "a/@eaDir"])
    draw(tmp_path / "notes/x.png", tmp_path / "train/y.png", tmp_path / "train/a/0_mask.png")
    (tmp_path / "train/a/readme.txt").write_text("x")
    source = opened(tmp_path)
    assert source.class_names == ["a", "b"]
    assert source.left_out == {
        "hidden or system folders": 2,
        "images outside class folders": 1,
        "images outside test, train": 1,
        "masks": 1,
        "not images": 1,
    }
    assert source.notes == [
        "left out 2 hidden or system folders, 1 images outside class folders, 1 images outside "
        "test, train, 1 masks, 1 not images"
    ]
    assert [len(samples) for samples in source.parts.values()] == [4, 4]
    kept = opened(tmp_path, include="*_mask.png", exclude=["notes", "nothing"])
    assert len(kept.parts["train"]) == 5
    assert kept.notes[-1] == "no file matches data.exclude=nothing"
    unused = opened(tmp_path, include="*.jpg").notes[0]
    assert unused == "nothing that would be left out matches data.include=*.jpg"


def test_patterns_leave_samples_of_any_layout_out(tmp_path):
    path = write_npz(tmp_path / "mine.npz")
    source = opened(path, exclude=["train/1", "val"])
    assert source.parts["train"].names == ["train/0", *(f"train/{i}" for i in range(2, 6))]
    assert len(source.parts["val"]) == 0
    assert source.left_out == {"excluded by train/1": 1, "excluded by val": 2}


def test_a_folder_of_masks_is_no_class(tmp_path):
    for name in ("cat", "dog"):
        draw(tmp_path / name / "images/1.png", tmp_path / name / "masks/1.png")
    assert opened(tmp_path).parts["all"].names == ["cat/images/1.png", "dog/images/1.png"]
    draw(tmp_path / "masks/1.png", tmp_path / "cat/1.png")
    refused("masks: class folder without images, but 1 masks: fill or remove", tmp_path)


def test_a_class_of_volumes_is_not_called_empty(tmp_path):
    class_folders(tmp_path, ["a", "b"])
    (tmp_path / "c").mkdir()
    (tmp_path / "c/scan.nii.gz").write_bytes(b"x")
    refused(r"c: class folder without images, but 1 volumes \(NIfTI\), which can't", tmp_path)


def test_class_folders_of_both_forms_are_one_class(tmp_path):
    whole, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    class_folders(tmp_path / "train", [whole, "tea"])
    class_folders(tmp_path / "test", [apart, "tea"])
    source = opened(tmp_path)
    assert source.class_names == [whole, "tea"]
    samples = source.parts["test"]
    assert samples.names[0] == f"test/{whole}/0.png" and samples.read(0).size == (4, 4)
    assert opened(tmp_path, classes=["tea", apart]).class_names == ["tea", whole]


def test_a_test_part_may_lack_a_class_but_train_may_not(tmp_path):
    class_folders(tmp_path / "train", ["a", "b", "c"])
    class_folders(tmp_path / "test", ["a", "c"])
    assert opened(tmp_path).parts["test"].labels.tolist() == [0, 0, 2, 2]


def test_broken_images_are_left_out_if_wanted(tmp_path):
    class_folders(tmp_path, ["a", "b"])
    (tmp_path / "a/bad.png").write_bytes(b"x")
    (tmp_path / "b/1.png").write_bytes((tmp_path / "b/1.png").read_bytes()[:40])
    assert len(opened(tmp_path).parts["all"]) == 5
    source = opened(tmp_path, skip_broken=True)
    assert source.parts["all"].names == ["a/0.png", "a/1.png", "b/0.png"]
    assert source.left_out == {"images that can't be read": 2}
    assert source.notes[0] == "left out a/bad.png: no known image format"
    assert source.notes[-1] == "left out 2 images that can't be read"


# csv


def write_csv(root, text, images="abcd"):
    draw(*(root / f"{name}.png" for name in images))
    path = root / "labels.csv"
    path.write_bytes(text.encode())
    return path


def test_csv(tmp_path):
    other = tmp_path / "other/e.png"
    draw(other)
    text = f"\ufeffpath, label ,patient\r\na.png,cat,p1\r\n./b.png,dog,p2\r\n{other},cat,p1\r\n"
    path = write_csv(tmp_path / "here", text)
    source = opened(path)
    samples = source.parts["all"]
    assert (source.name, source.class_names) == ("csv", ["cat", "dog"])
    assert samples.names == ["a.png", "b.png", "../other/e.png"]
    assert samples.labels.tolist() == [0, 1, 0] and samples.patients == ["p1", "p2", "p1"]
    assert samples.read(2).size == (4, 4)


def test_csv_with_split_and_numbers(tmp_path):
    text = "path,label,split\na.png,10,train\nb.png,9,train\nc.png,9,val\nd.png,10,test\n"
    source = opened(write_csv(tmp_path, text))
    assert source.class_names == ["9", "10"]
    assert source.parts["train"].labels.tolist() == [1, 0]
    assert source.parts["test"].names == ["d.png"] and source.parts["val"].patients is None


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "line 1: no column 'path' in ''"),
        ("where;label\na.png;x\n", "line 1: no column 'path' in 'label,where'"),
        ("path,age\na.png,7\n", "line 1: no column 'label' in 'path,age'"),
        ("path,label\n", "no line for training"),
        ("path,label\na.png,x\nnone.png,y\n", "line 3: none.png: no such file"),
        ("path,label\na.png,x\nb.png\n", "line 3: label is empty"),
        ("path,label\n,x\n", "line 2: path is empty"),
        ("path,label,split\na.png,x,tset\n", "line 2: split='tset'"),
        ("path,label,split\na.png,x,\n", "line 2: split=''"),
        ("path,label,split\na.png,x,test\n", "no line for training"),
        ("path,label,split\na.png,x,train\n./a.png,x,test\n", "line 3: a.png is already in line 2"),
        ("path,label,patient\na.png,x,\n", "line 2: patient is empty"),
    ],
)
def test_bad_csv(tmp_path, text, match):
    refused(f"labels.csv.*{match}", write_csv(tmp_path, text))


def test_csv_that_is_not_text(tmp_path):
    path = write_csv(tmp_path, "")
    path.write_bytes(b"PK\x03\x04\xff\x00\x00path,label\n")
    refused("not CSV in UTF-8, UTF-16 or Windows-1252", path)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_csv_dialects(tmp_path, separator, encoding):
    path = write_csv(tmp_path, "")
    text = "path,label\r\na.png,Säge\r\nb.png,dog\r\n".replace(",", separator)
    path.write_bytes(text.encode(encoding))
    source = opened(path)
    assert source.class_names == ["Säge", "dog"]
    assert source.parts["all"].names == ["a.png", "b.png"]
    assert source.notes == (
        ["the table is not UTF-8, and was read as Windows-1252"] if encoding == "cp1252" else []
    )
    assert opened(path.rename(tmp_path / "labels.TSV")).class_names == ["Säge", "dog"]


@pytest.mark.parametrize(
    "column",
    [
        *("patient_id", "Patient", "PatientID", "lesion_id", "Patient ID", "subject"),
        *("PID", "MRN", "ptid", "donor_id", "eye_id", "StudyInstanceUID", "slide_id"),
    ],
)
def test_patients_of_usual_columns_are_kept_apart(tmp_path, column):
    rows = "".join(f"{name}.png,{'xy'[i % 2]},p{i // 2}\n" for i, name in enumerate("abcd"))
    source = opened(write_csv(tmp_path, f"path,label,{column}\n{rows}"))
    assert source.parts["all"].patients == ["p0", "p0", "p1", "p1"]
    assert source.medical
    assert source.notes == [f"patient is column {column!r}"]


@pytest.mark.parametrize(
    ("column", "words"),
    [
        *(
            ("Split", ("train", "test")),
            ("subset", ("Training", "Testing")),
            ("SET", ("TRAIN", "dev")),
        ),
        *(("fold", ("train", "test")), ("Usage", ("Training", "PrivateTest"[7:]))),
    ],
)
def test_parts_of_usual_columns(tmp_path, column, words):
    text = f"path,label,{column}\na.png,x,{words[0]}\nb.png,y,{words[0]}\nc.png,x,{words[1]}\n"
    parts = opened(write_csv(tmp_path, text)).parts
    assert parts["train"].names == ["a.png", "b.png"] and parts["test"].names == ["c.png"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("path,label,pateint\na.png,x,1\n", "line 1: column 'pateint' looks like patient"),
        ("path,label,lesion\na.png,x,1\n", "column 'lesion' looks like patient"),
        ("path,label,patient_no\na.png,x,1\n", "column 'patient_no' looks like patient"),
        ("path,label,splt\na.png,x,1\n", "line 1: column 'splt' looks like split"),
        ("path,label,is_valid\na.png,x,1\n", "column 'is_valid' looks like split"),
        ("path,label,train_or_test\na.png,x,1\n", "column 'train_or_test' looks like split"),
        ("path,label,mode\na.png,x,train\nb.png,y,TEST\n", "column 'mode' looks like split"),
        ("path,label,is_test\na.png,x,1\n", "column 'is_test' looks like split"),
        ("path,label,fold\na.png,x,3\n", "line 2: split='3'"),
        ("path,label\na.png,x,y\n", "line 2: 3 fields, but the header has 2"),
        ("path,label\nsome, a.png,x\n", "line 2: 3 fields"),
        ("path,target,diagnosis\na.png,x,y\n", "target and diagnosis could all be the label"),
        ("path,label,patient_id,PatientID\na.png,x,1,2\n", "could all be the patient"),
        ("path,label,label\na.png,x,y\n", "column label twice"),
        ("image,mel,nv\na.png,1,0\nb.png,0,2\n", "no column 'label' in 'image,mel,nv'"),
    ],
)
def test_columns_that_are_not_understood_are_refused(tmp_path, text, match):
    refused(f"labels.csv.*{match}", write_csv(tmp_path, text))


def test_other_columns_are_named(tmp_path):
    text = ",path,label,age,patient_age\n0,a.png,x,7,8\n1,b.png,y,7,8\n"
    source = opened(write_csv(tmp_path, text))
    assert source.notes == ["columns that are not read: age, patient_age"]
    assert source.parts["all"].patients is None
    trailing = write_csv(tmp_path, "path,label,\na.png,x,\nb.png,y,\n")
    assert opened(trailing).class_names == ["x", "y"]


def test_the_table_of_ham10000(tmp_path):
    draw(tmp_path / "part_1/ISIC_1.jpg", tmp_path / "part_2/ISIC_2.jpg")
    path = tmp_path / "HAM10000_metadata.csv"
    path.write_text(
        "lesion_id,image_id,dx,dx_type,age\nL1,ISIC_1,nv,histo,80.0\nL2,ISIC_2,mel,histo,\n"
    )
    source = opened(path)
    samples = source.parts["all"]
    assert samples.names == ["part_1/ISIC_1.jpg", "part_2/ISIC_2.jpg"]
    assert source.class_names == ["mel", "nv"] and samples.labels.tolist() == [1, 0]
    assert samples.patients == ["L1", "L2"]
    draw(tmp_path / "part_2/ISIC_1.png")
    refused("line 2: ISIC_1 may be each of .*part_1/ISIC_1.jpg, .*part_2/ISIC_1.png", path)


def test_the_table_of_isic_has_a_column_a_class(tmp_path):
    text = "image,MEL,NV,UNK\na,1.0,0.0,0.0\nb,0.0,1.0,0.0\nc,0,1,0\n"
    source = opened(write_csv(tmp_path, text))
    assert source.class_names == ["MEL", "NV"] and source.target.name == "multiclass"
    assert source.parts["all"].labels.tolist() == [0, 1, 1]
    assert source.notes == [
        "path is column 'image'",
        "classes are columns MEL, NV, UNK",
        "left out classes without an image: UNK",
    ]
    several = opened(write_csv(tmp_path, "path,x,y\na.png,1,1\nb.png,0,1\nc.png,0,0\n"))
    assert several.target.name == "multilabel"
    assert several.parts["all"].labels.tolist() == [[1, 1], [0, 1], [0, 0]]


def test_paths_of_windows_and_of_both_forms(tmp_path):
    whole, apart = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    draw(tmp_path / f"img/{apart}/1.png", tmp_path / "img/2.png")
    text = f"path,label\nimg\\{whole}\\1.png,x\n.\\img\\2.png,{apart}\n"
    source = opened(write_csv(tmp_path, text))
    samples = source.parts["all"]
    assert samples.names == [f"img/{whole}/1.png", "img/2.png"]
    assert samples.read(0).size == (4, 4) and source.class_names == ["x", whole]


@pytest.mark.parametrize("before", ["C:\\Users\\me\\data\\", "/home/me/data/"])
def test_absolute_paths_of_another_machine(tmp_path, before):
    draw(tmp_path / "img/1.png", tmp_path / "other/2.png")
    path = write_csv(tmp_path, f"path,label\n{before}img/1.png,x\n{before}other/2.png,y\n")
    assert opened(path).parts["all"].names == ["img/1.png", "other/2.png"]
    missing = write_csv(tmp_path, f"path,label\n{before}img/1.png,x\n{before}img/2.png,y\n")
    refused("line 3: .*img/2.png: no such file", missing)


def test_csv_parts_of_the_folders(tmp_path):
    draw(*(tmp_path / f"{name}.png" for name in ("train/1", "train/2", "test/3")))
    text = "path,label\ntrain/1.png,x\ntrain/2.png,y\ntest/3.png,x\n"
    source = opened(write_csv(tmp_path, text))
    assert {part: len(samples) for part, samples in source.parts.items()} == {"train": 2, "test": 1}
    assert source.notes == ["parts are the folders of the paths: train, test"]


def test_csv_patterns(tmp_path):
    text = "path,label\na.png,x\nb.png,y\nold/gone.png,x\n"
    source = opened(write_csv(tmp_path, text), exclude="old")
    assert source.parts["all"].names == ["a.png", "b.png"]
    assert source.left_out == {"excluded by old": 1}


# imagefolder


def test_metadata_of_hugging_face(tmp_path):
    for part in ("train", "test"):
        draw(tmp_path / part / "1.png", tmp_path / part / "2.png")
        lines = "file_name,label,text\n1.png,x,one\n2.png,y,two\n"
        (tmp_path / part / "metadata.csv").write_text(lines)
    source = opened(tmp_path)
    assert (source.name, source.class_names) == ("imagefolder", ["x", "y"])
    assert source.parts["test"].names == ["test/1.png", "test/2.png"]
    assert source.notes == ["path is column 'file_name'", "columns that are not read: text"]
    whole = tmp_path / "whole"
    draw(whole / "1.png", whole / "2.png")
    (whole / "metadata.csv").write_text("file_name,label\n1.png,x\n2.png,y\n")
    assert opened(whole).parts["all"].names == ["1.png", "2.png"]


def test_metadata_without_labels_leaves_the_class_folders(tmp_path):
    class_folders(tmp_path, ["a", "b"])
    (tmp_path / "metadata.csv").write_text("file_name,text\na/0.png,x\n")
    assert opened(tmp_path).name == "folder"


# npz


def arrays(**changes):
    values = {}
    for part, count in (("train", 6), ("val", 2), ("test", 4)):
        values[f"{part}_images"] = np.zeros((count, 5, 5), np.uint8)
        values[f"{part}_labels"] = np.arange(count, dtype=np.uint8)[:, None] % 2
    values.update(changes)
    return {key: value for key, value in values.items() if value is not None}


def write_npz(path, **changes):
    np.savez(path, **arrays(**changes))
    return path


def test_npz(tmp_path):
    source = opened(write_npz(tmp_path / "mine.npz"))
    assert (source.name, source.class_names) == ("npz", ["0", "1"])
    assert source.parts["train"].labels.tolist() == [0, 1] * 3
    assert source.parts["test"].names == [f"test/{i}" for i in range(4)]
    without = write_npz(tmp_path / "b.npz", val_images=None, val_labels=None)
    assert opened(without).parts.keys() == {"train", "test"}


@pytest.mark.parametrize("stem", ["pneumoniamnist_224", "pneumoniamnist_64"])
def test_npz_takes_the_card_of_its_file_name(tmp_path, monkeypatch, stem):
    monkeypatch.setattr(sources, "_check_sums", lambda root, card: None)
    monkeypatch.setattr(sources, "_check_dump", lambda parts, card, where: None)
    source = opened(write_npz(tmp_path / f"{stem}.npz"))
    assert source.name == "pneumoniamnist" and source.class_names == source.card.classes
    assert opened(write_npz(tmp_path / "digits.npz")).name == "npz"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"test_images": None}, "no test_images among test_labels, train_images"),
        ({"val_labels": None}, "no val_labels"),
        ({"train_images": np.zeros((6, 5, 5))}, r"train_images is float64 \(6, 5, 5\)"),
        ({"train_images": np.zeros((6, 5, 5, 4), np.uint8)}, r"train_images is uint8 \(6, 5, 5, 4"),
        ({"train_labels": np.zeros((6, 3), np.uint8)}, "parts have different numbers of columns"),
        (
            {"train_labels": np.full((6, 3), 2)},
            "train_labels has several columns: all must",
        ),
        (
            {"train_labels": np.zeros((5, 3), np.uint8)},
            "train_labels is uint8 .*must be 6 integers",
        ),
        ({"train_labels": np.zeros(5, np.uint8)}, "train_labels is uint8 .*must be 6 integers"),
        ({"train_labels": np.zeros(6)}, "train_labels is float64"),
        ({"train_labels": np.full(6, -1)}, "label -1: labels must count from 0"),
        ({"extra": np.array([object()])}, "not a whole .npz file of plain arrays"),
    ],
)
def test_bad_npz(tmp_path, changes, match):
    refused(match, write_npz(tmp_path / "x.npz", **changes))


def test_npz_that_is_none(tmp_path):
    path = write_npz(tmp_path / "x.npz")
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        path.write_bytes(content)
        refused("x.npz: not a whole .npz file", path)
    np.save(tmp_path / "y.npy", np.zeros(3))
    (tmp_path / "y.npy").rename(path)
    refused("x.npz: not a whole .npz file", path)


def test_the_medmnist_packages_download_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    refused("data.name=breastmnist needs data.root", name="breastmnist")
    (tmp_path / ".medmnist").mkdir()
    monkeypatch.setattr(sources, "_check_dump", lambda parts, card, where: None)
    monkeypatch.setattr(sources, "_check_sums", lambda root, card: None)
    for size, file in ((5, "breastmnist"), (9, "breastmnist_224"), (12, "bloodmnist_224")):
        images = {f"{part}_images": np.zeros((count, size, size), np.uint8)
                  for part, count in (("train", 6), ("val", 2), ("test", 4))}  # fmt: skip
        write_npz(tmp_path / f".medmnist/{file}.npz", **images)
    assert opened(name="breastmnist").parts["train"].images.shape == (6, 9, 9)


def test_a_download_that_was_cut_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".medmnist").mkdir()
    write_npz(tmp_path / ".medmnist/breastmnist_64.npz")
    refused("breastmnist_64.npz: checksum md5:.* differs from the published", name="breastmnist")


def test_sums_and_counts_are_those_of_the_medmnist_package():
    for name in (name for name in INFO if not name.endswith("3d")):
        card, published = load_card(name), INFO[name]
        assert card.num_images == published["n_samples"]
        assert card.checksums == {
            f"{name}{size}.npz": f"md5:{published[f'MD5{size}']}"
            for size in ("", "_64", "_128", "_224")
        }


@pytest.mark.skipif("VPT_REAL_DATA" not in os.environ, reason="VPT_REAL_DATA is not set")
@pytest.mark.parametrize(
    ("name", "counts"), [("breastmnist", [546, 78, 156]), ("pneumoniamnist", [4708, 524, 624])]
)
def test_real_medmnist(name, counts):
    source = opened(Path(os.environ["VPT_REAL_DATA"]) / f"{name}.npz")
    assert source.name == name and len(source.class_names) == 2
    assert [len(samples) for samples in source.parts.values()] == counts
    assert source.parts["train"].read(0).size == (28, 28)


# cards


CARD = Card(title="t", source="s", licence="l", get="get it there", layout="zhou", split="s",
            split_file="split_zhou_X.json", images="pics")  # fmt: skip


def use_card(monkeypatch, **changes):
    monkeypatch.setattr(sources, "load_card", lambda name: CARD.model_copy(update=changes))


def write_zhou(root, **changes):
    split = {
        "train": [["dog/1.png", 1, "big_dog"], ["cat/1.png", 0, "cat"]],
        "val": [["cat/2.png", 0, "cat"]],
        "test": [["dog/2.png", 1, "big_dog"]],
    }
    draw(*(root / "pics" / row[0] for part in split.values() for row in part))
    split.update(changes)
    (root / "split_zhou_X.json").write_text(json.dumps(split))


def test_a_class_name_twice_is_refused_with_its_mend(tmp_path, monkeypatch):
    use_card(monkeypatch)
    write_zhou(
        tmp_path,
        train=[["dog/1.png", 1, "big_dog"], ["cat/1.png", 0, "cat"], ["cat/2.png", 2, "cat"]],
        val=[],
    )
    refused("class names twice, cat: give each class its own name, in data.classes",
            tmp_path, name="x")  # fmt: skip
    names = ["cat", "dog", "other cat"]
    source = opened(tmp_path, name="x", classes=names)
    assert source.class_names == names
    assert source.parts["train"].labels.tolist() == [1, 0, 2]


def test_data_may_lack_classes_of_a_list(tmp_path):
    class_folders(tmp_path / "two", ["a", "c"])
    source = open_source(DataConfig(root=tmp_path / "two"), among=["c", "b", "a"])
    assert source.class_names == ["c", "b", "a"]
    assert source.parts["all"].labels.tolist() == [2, 2, 0, 0]
    assert opened(tmp_path / "two", classes=["c", "b", "a"]).class_names == ["c", "b", "a"]
    other = open_source(DataConfig(root=tmp_path / "two"), among=["x", "y", "z"])
    assert other.class_names == ["a", "c"]
    class_folders(tmp_path / "one", ["c"])
    assert open_source(DataConfig(root=tmp_path / "one"), among=["a", "c"]).parts[
        "all"
    ].labels.tolist() == [1, 1]


def test_zhou(tmp_path, monkeypatch):
    use_card(monkeypatch, num_classes=2)
    write_zhou(tmp_path)
    source = opened(tmp_path, name="x")
    assert source.class_names == ["cat", "big_dog"]
    assert source.parts["train"].names == ["pics/dog/1.png", "pics/cat/1.png"]
    assert source.parts["train"].labels.tolist() == [1, 0]
    assert source.parts["test"].read(0).size == (4, 4)


def test_lists_name_files_in_either_form(tmp_path, monkeypatch):
    use_card(monkeypatch)
    whole, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    rows = [[f"{whole}/1.png", 0, whole], [f"{apart}/2.png", 1, "tea"]]
    write_zhou(tmp_path, train=rows, val=[], test=[])
    draw(tmp_path / "pics" / apart / "1.png", tmp_path / "pics" / whole / "2.png")
    samples = opened(tmp_path, name="x").parts["train"]
    assert [samples.read(i).size for i in range(2)] == [(4, 4), (4, 4)]


def test_bad_zhou(tmp_path, monkeypatch):
    use_card(monkeypatch)
    refused("name=x needs data.root=PATH: get it there", name="x")
    refused("no such file or folder: get it there", tmp_path / "none", name="x")
    refused("split_zhou_X.json: no such file: get it there", tmp_path, name="x")
    write_zhou(tmp_path, val=[["gone.png", 0, "cat"]])
    refused("1 files of the val list are missing, first pics/gone.png: get", tmp_path, name="x")
    write_zhou(tmp_path, train=[["dog/1.png", 3, "dog"]])
    refused("labels are not 0 to", tmp_path, name="x")
    write_zhou(tmp_path, train=[["dog/1.png"]])
    refused("split_zhou_X.json: not ", tmp_path, name="x")
    (tmp_path / "split_zhou_X.json").write_text("{")
    refused("split_zhou_X.json: not ", tmp_path, name="x")
    use_card(monkeypatch, num_classes=37)
    write_zhou(tmp_path)
    refused("2 classes, not 37: get it there", tmp_path, name="x")


def test_npz_with_several_labels_an_image(tmp_path):
    labels = {
        f"{part}_labels": np.eye(3, dtype=np.uint8)[np.arange(count) % 3]
        for part, count in (("train", 6), ("val", 2), ("test", 4))
    }
    path = write_npz(tmp_path / "x.npz", **labels)
    source = opened(path)
    assert source.target.name == "multilabel" and source.class_names == ["0", "1", "2"]
    assert source.parts["train"].labels.dtype == np.float32
    assert np.array_equal(source.parts["test"].labels, labels["test_labels"])
    turned = opened(path, classes=["2", "0", "1"])
    assert np.array_equal(turned.parts["test"].labels, labels["test_labels"][:, [2, 0, 1]])


def test_root_of_the_wrong_kind(tmp_path):
    path = write_npz(tmp_path / "x.npz")
    refused("name=folder expects a folder, not a .npz file", path, name="folder")
    refused("name=npz expects a .npz file, not a folder", tmp_path, name="npz")
    refused("name=csv expects a .csv file, not a .npz file", path, name="csv")


def test_checksums_of_what_is_there(tmp_path, monkeypatch):
    class_folders(tmp_path, ["a", "b"])
    archive = tmp_path / "x.zip"
    archive.write_bytes(b"content")
    right = "sha256:" + hashlib.sha256(b"content").hexdigest()
    use_card(monkeypatch, layout="folder", checksums={"x.zip": right, "absent.zip": right})
    assert opened(tmp_path, name="x").class_names == ["a", "b"]
    archive.write_bytes(b"damaged")
    refused("x.zip: checksum sha256:.* differs from the published sha256:", tmp_path, name="x")
    path = write_npz(tmp_path / "x.npz")
    use_card(monkeypatch, layout="npz", checksums={"x.npz": "md5:0", "x.zip": right})
    refused("x.npz: checksum md5:.* differs from the published md5:0: download", path, name="x")


def test_card_names_of_classes(tmp_path, monkeypatch):
    class_folders(tmp_path, ["n01", "n02"])
    use_card(monkeypatch, layout="folder", classes=["tench", "goldfish"])  # names for codes
    assert opened(tmp_path, name="x").class_names == ["tench", "goldfish"]
    use_card(monkeypatch, layout="folder", classes=["n02", "n01"])  # the folders' order counts
    assert opened(tmp_path, name="x").class_names == ["n01", "n02"]
    use_card(monkeypatch, layout="folder", classes=["n01", "cat"])
    refused("classes differ from the card's: cat, n02", tmp_path, name="x")


def test_configuration_overrides_the_card(tmp_path):
    class_folders(tmp_path, ["a", "b"])
    source = opened(tmp_path)
    assert (source.templates, source.augment) == (source.card.templates, source.card.augment)
    source = opened(tmp_path, classes=["x", "y"], templates=["the {}"], augment="crop")
    assert source.class_names == ["x", "y"]
    assert (source.templates, source.augment) == (["the {}"], "crop")
    refused("data.classes has 3 names, but the data has 2 classes", tmp_path, classes=["x"] * 3)
    for templates in (["a photo"], ["{} {}"], ["ok {}", "no"], []):
        refused("data.templates: .* needs {} once", tmp_path, templates=templates)

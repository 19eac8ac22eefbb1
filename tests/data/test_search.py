"""Images below a folder: which files count, and what is left out by which name."""

import os
import unicodedata

import numpy as np
import pytest
from PIL import Image
from tiny import write_image

from vpt.data.images import read_image
from vpt.data.search import list_images, matches, say, search
from vpt.errors import InputError


def mask(path, values=2, size=(40, 36)):
    """A picture of few grey values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.arange(size[1])[:, None] * values // size[1]
    grey = np.broadcast_to(rows * (255 // (values - 1)), size[::-1])
    Image.fromarray(grey.astype(np.uint8)).save(path)


def names(folder, **patterns):
    return list(search(folder, **patterns).images)


def test_images_are_found_in_one_order(tmp_path):
    for name in ("b/2.PNG", "b/10.jpeg", "a.jpg", "Z.tif"):
        write_image(tmp_path / name)
    assert names(tmp_path) == ["Z.tif", "a.jpg", "b/10.jpeg", "b/2.PNG"]


@pytest.mark.parametrize(
    "suffix",
    [
        *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "bmp", "dib", "tif", "tiff", "webp", "gif"),
        *("ppm", "pgm", "pbm", "pnm", "avif", "jp2", "j2k", "jpx", "qoi", "tga"),
    ],
)
def test_every_format_is_found_and_read(tmp_path, suffix):
    modes = {"pgm": "L", "pbm": "1"}
    path = tmp_path / f"a.{suffix}"
    Image.new(modes.get(suffix, "RGB"), (9, 5), 200).save(path)
    assert search(tmp_path).images == {path.name: path}
    assert read_image(path).size == (9, 5)


@pytest.mark.parametrize(
    "kind",
    [*("JPEG", "PNG", "TIFF", "WEBP", "AVIF", "JPEG2000", "BMP"), *("ICO", "PCX", "SGI", "DDS")],
)
@pytest.mark.parametrize("name", ["0001", "scan.17", "photo.img"])
def test_files_of_unknown_suffix_are_known_by_content(tmp_path, kind, name):
    Image.new("RGB", (9, 5), "red").save(tmp_path / name, kind)
    assert names(tmp_path) == [name]
    assert read_image(tmp_path / name).size == (9, 5)


def test_what_is_no_image_is_counted_by_kind(tmp_path):
    write_image(tmp_path / "a.png")
    for name in ("notes.txt", "labels.json", "model", "x.bin", "empty"):
        (tmp_path / name).write_bytes(b"P6 is not an image" * (name != "empty"))
    for name in ("b.HEIC", "c.heic", "d.nii.gz", ".x.png", "Thumbs.db", "__MACOSX/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    images, left_out, _ = search(tmp_path)
    assert list(images) == ["a.png"]
    assert say(left_out) == (
        "2 .heic images, which can't be read, 1 broken links, 2 hidden or system files, "
        "1 hidden or system folders, 5 not images, 1 volumes (NIfTI), which can't be read"
    )


@pytest.mark.parametrize(
    "folder",
    [
        *("@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"),
        *("__pycache__", "__MACOSX", ".ipynb_checkpoints", "@Recycle", "$Recycle.Bin"),
        *("~snapshot", "@sharebin", "Config.Msi", "$Extend", "node_modules", "~$draft"),
    ],
)
def test_what_systems_leave_is_no_data(tmp_path, folder):
    write_image(tmp_path / "cat/a.png")
    write_image(tmp_path / "cat" / folder / "a.png")
    write_image(tmp_path / folder / "deep" / "b.png")
    images, left_out, _ = search(tmp_path)
    assert list(images) == ["cat/a.png"]
    assert say(left_out) == "2 hidden or system folders"


@pytest.mark.parametrize(
    "name", ["a.png~", "a.png.bak", "a.png.tmp", "b.jpg.part", "b.jpg.crdownload", "a.PNG.orig"]
)
def test_backups_and_unfinished_downloads_are_no_data(tmp_path, name):
    write_image(tmp_path / "a.png")
    (tmp_path / name).write_bytes((tmp_path / "a.png").read_bytes())
    images, left_out, _ = search(tmp_path)
    assert list(images) == ["a.png"] and left_out == {name: "backups and unfinished downloads"}


def test_links_are_followed_and_each_real_folder_is_read_once(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    write_image(data / "cat/1.png")
    write_image(other / "more/2.png")
    write_image(data / "dog/own/3.png")
    (data / "cat/linked").symlink_to(other)
    (data / "cat/loop").symlink_to(data)
    (data / "cat/dogs").symlink_to(data / "dog/own")
    (data / "cat/file.png").symlink_to(other / "more/2.png")
    images, left_out, _ = search(data)
    assert list(images) == ["cat/1.png", "cat/file.png", "cat/linked/more/2.png", "dog/own/3.png"]
    assert say(left_out) == "2 links to folders that are read already"


@pytest.mark.parametrize(
    "name",
    [
        *("x_mask.png", "x-mask.png", "x.mask.png", "x mask.png", "x_MASK.png", "x_mask_1.png"),
        *("x_mask12.png", "x_seg.png", "x_segmentation.tif", "x_label.png", "x_labels.gif"),
        *("x_gt.bmp", "x_annotation.png", "x_ground_truth.png", "mask_x.png", "masks/x.png"),
        *("labels/x.png", "masks/x_mask.png", "x_msk.png", "x (mask).png", "x_mask(1).png"),
        *("x_labelmap.png", "x_labelIds.png", "x_trimap.png", "x_instance_mask.png"),
        *("_masks/x.png", "segmentation_masks/x.png"),
    ],
)
def test_masks_of_images_are_left_out(tmp_path, name):
    write_image(tmp_path / "x.jpg")
    mask(tmp_path / name, values=3)
    images, left_out, _ = search(tmp_path)
    assert list(images) == ["x.jpg"] and left_out == {name: "masks"}
    assert names(tmp_path, include=[name]) == sorted(["x.jpg", name])


def test_masks_that_were_compressed_or_have_colours_are_masks(tmp_path):
    write_image(tmp_path / "x.jpg", size=(200, 180))
    mask(tmp_path / "x_mask.jpg", size=(200, 180))
    colours = Image.new("RGB", (90, 90), "red")
    colours.paste("blue", (0, 0, 40, 40))
    colours.save(tmp_path / "x_seg.png")
    colours.convert("P").save(tmp_path / "x_gt.png")
    assert names(tmp_path) == ["x.jpg"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("img1", "img10"), ("cat", "cat2"), ("x", "x_2"), ("x", "xmask"), ("x", "x_masked")),
        *(("y", "x_mask"), ("a/x", "b/x_mask")),
    ],
)
def test_other_pairs_of_names_are_images(tmp_path, one, other):
    write_image(tmp_path / f"{one}.png")
    mask(tmp_path / f"{other}.png")
    assert names(tmp_path) == sorted([f"{one}.png", f"{other}.png"])


def test_a_photograph_called_label_is_an_image(tmp_path):
    write_image(tmp_path / "wine.png", 1)
    write_image(tmp_path / "wine_label.png", 2)
    assert names(tmp_path) == ["wine.png", "wine_label.png"]


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        ("*.gif", ["a/x.gif", "b/deep/x.gif"]),
        ("b", ["b/deep/x.gif", "b/y.png"]),
        ("b/", ["b/deep/x.gif", "b/y.png"]),
        ("b/*.png", ["b/y.png"]),
        ("deep", ["b/deep/x.gif"]),
        ("**/deep/*", ["b/deep/x.gif"]),
        ("**/a/*", ["a/x.gif"]),
        ("[xy].png", ["b/y.png"]),
        ("x", []),
    ],
)
def test_patterns(pattern, matching):
    paths = ["a/x.gif", "b/deep/x.gif", "b/y.png"]
    assert [path for path in paths if matches(path, pattern)] == matching


def test_patterns_leave_out_and_keep(tmp_path):
    for name in ("a.png", "b.png", "old/c.png", ".d.png"):
        write_image(tmp_path / name)
    found = search(tmp_path, exclude=["old", "b*"], include=[".d.png"])
    assert list(found.images) == [".d.png", "a.png"]
    assert found.left_out == {"b.png": "excluded by b*", "old/c.png": "excluded by old"}
    assert found.kept == {".d.png"}


def test_a_folder_that_cannot_be_opened_is_counted(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "closed/b.png")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    images, left_out, _ = search(tmp_path)
    assert list(images) == ["a.png"]
    assert left_out == {"closed": "folders that can't be opened"}


def test_names_are_in_one_form(tmp_path):
    apart = unicodedata.normalize("NFD", "é")
    write_image(tmp_path / f"{apart}.png")
    path = search(tmp_path).images["é.png"]
    assert path.is_file()
    write_image(tmp_path / "é.png")  # another file, of another form
    assert len(names(tmp_path)) == 2


def test_a_list_says_what_it_leaves_out_of_folders(tmp_path):
    write_image(tmp_path / "some/a.jfif", mode="RGB")
    mask(tmp_path / "some/a_mask.png")
    (tmp_path / "some/b.txt").write_text("x")
    lines = []
    listed = list_images([tmp_path / "some", tmp_path / "some/b.txt"], lines.append)
    assert listed == [tmp_path / "some/a.jfif", tmp_path / "some/b.txt"]
    assert lines == [f"{tmp_path / 'some'}: left out 1 masks, 1 not images"]
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans/x.nii.gz").write_bytes(b"x")
    with pytest.raises(InputError, match=r"scans: no images in this folder: 1 volumes \(NIfTI\)"):
        list_images([tmp_path / "scans"])

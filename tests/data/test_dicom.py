"""Against pydicom's own pixels of the files that it ships, and the formulas of DICOM PS3.3."""

import subprocess
import sys
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut, apply_rescale, pixel_array
from pydicom.uid import UID

from vpt.config import DataConfig, Window
from vpt.data import dicom
from vpt.data.fewshot import split_shots
from vpt.data.images import Samples, is_dicom, read_image
from vpt.data.search import search
from vpt.data.sources import open_source
from vpt.data.survey import check_images
from vpt.errors import InputError

SHIPPED = Path(pydicom.__file__).parent / "data/test_files"
FILES = sorted(
    path.relative_to(SHIPPED).as_posix()
    for path in [*SHIPPED.glob("*.dcm"), *SHIPPED.glob("dicomdirtests/*/*/*")]
    if path.is_file() and is_dicom(path)
)
NOT_DICOM = {"ExplVR_BigEndNoMeta", "ExplVR_LitEndNoMeta", "no_meta", "rtstruct"}
NO_PIXELS = {
    "UN_sequence", "empty_charset_LEI", "no_meta_group_length", "priv_SQ", "reportsi",
    "reportsi_with_empty_number_tags", "rtplan", "rtplan_truncated", "test-SR", "waveform_ecg",
}  # fmt: skip
REFUSED = {
    **dict.fromkeys(NOT_DICOM, "not whole DICOM, or encrypted"),
    **dict.fromkeys(NO_PIXELS, "DICOM without pixels"),
    **dict.fromkeys(["JPEG-lossy", "JPGExtended"], "supported: JPEG Extended"),  # 12 bits
    **dict.fromkeys(["MR_truncated", "badVR", "nested_priv_SQ"], "damaged DICOM"),
    "JPEG2000-embedded-sequence-delimiter": "supported: JPEG 2000",
    "meta_missing_tsyntax": "an unknown transfer syntax",
}
CT, MR, CR = SHIPPED / "CT_small.dcm", SHIPPED / "MR_small.dcm", "dicomdirtests/77654033/CR1/6154"
SECRETS = {"PatientName": "Doe^Jane", "PatientID": "MRN-4711", "StudyDescription": "SECRETSTUDY"}


def linear(values, center, width):
    """PS3.3 C.11.2.1.2.1, to 0–1."""
    return np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1)


def expected(path):
    dataset = pydicom.dcmread(path)
    stored = pixel_array(dataset, index=int(dataset.get("NumberOfFrames", 1)) // 2)
    kind = dataset.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        return apply_color_lut(stored, dataset) / 65535
    if not kind.startswith("MONO"):
        return stored / (2**dataset.BitsStored - 1)
    values = apply_rescale(stored, dataset).astype(float)
    if "WindowCenter" in dataset:
        center, width = (np.ravel(dataset[key].value)[0] for key in ("WindowCenter", "WindowWidth"))
        grey = linear(values, float(center), float(width))
    elif dataset.BitsStored == 8:
        grey = values / 255
    else:
        grey = (values - values.min()) / np.ptp(values)
    return 1 - grey if kind == "MONOCHROME1" else grey


def pixels(path, windows=None):
    image = read_image(path, windows=windows)
    assert image.mode == "RGB"
    return np.asarray(image)


def write(path, template=CT, array=None, **changes):
    """The template's file at `path` with other attributes (None: without), and other pixels."""
    dataset = pydicom.dcmread(template)
    for key, value in changes.items():
        if value is None:
            del dataset[key]
        else:
            setattr(dataset, key, value)
    if array is not None:
        dataset.PixelData = array.astype("<i2").tobytes()
        dataset.Rows, dataset.Columns = changes.get("Rows", array.shape[0]), array.shape[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path)
    return path


def scan(path, patient, seed=0, **changes):
    noise = np.random.default_rng(seed).integers(0, 2000, (16, 16))
    return write(path, array=noise, PatientID=patient, **changes)


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_pydicom_ships_is_read_right_or_refused(name):
    path = SHIPPED / name
    if path.stem in REFUSED:
        with pytest.raises(InputError, match=f"{path.stem}.dcm: not an .*{REFUSED[path.stem]}"):
            read_image(path)
        return
    found = pixels(path).astype(float)
    reference = expected(path) * 255
    if reference.ndim == 2:
        reference = reference[..., None].repeat(3, -1)
    assert found.shape == reference.shape
    assert np.abs(found - reference).max() <= 1


def test_the_files_hold_every_kind():
    read = [pydicom.dcmread(SHIPPED / n) for n in FILES if Path(n).stem not in REFUSED]
    kinds = {d.PhotometricInterpretation for d in read}
    assert kinds >= {"MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL",
                     "YBR_FULL_422", "YBR_RCT"}  # fmt: skip
    syntaxes = {d.file_meta.TransferSyntaxUID for d in read}
    for name in ("JPEGBaseline8Bit", "JPEGLosslessSV1", "JPEGLSLossless", "JPEG2000Lossless",
                 "JPEG2000", "RLELossless", "DeflatedExplicitVRLittleEndian"):  # fmt: skip
        assert getattr(pydicom.uid, name) in syntaxes, name


def test_monochrome1_is_bright_where_stored_values_are_low(tmp_path):
    stored = pydicom.dcmread(SHIPPED / CR).pixel_array.reshape(-1)
    shown = pixels(SHIPPED / CR)[..., 0].reshape(-1)
    assert (np.diff(shown[np.argsort(stored)].astype(int)) <= 0).all()
    assert shown[stored.argmin()] > shown[stored.argmax()]
    inverted = write(tmp_path / "x.dcm", PhotometricInterpretation="MONOCHROME1")
    assert (pixels(inverted) == 255 - pixels(CT)).all()


def test_every_window(tmp_path):
    units = np.arange(-1200, 1300).reshape(50, 50)
    ramp = write(tmp_path / "ramp.dcm", array=units + 1024)  # its rescale intercept is -1024
    for name, (center, width) in dicom.WINDOWS.items():
        found = pixels(ramp, (name,) * 3)
        assert (found == np.rint(255 * linear(units, center, width))[..., None]).all(), name
    assert set(dicom.WINDOWS) == set(Window.__args__)


def test_windows_are_those_of_radiopaedia():
    """Level and width of https://radiopaedia.org/articles/windowing-ct, in Hounsfield units."""
    assert dicom.WINDOWS == {
        "lung": (-600, 1500),
        "mediastinum": (50, 350),
        "abdomen": (50, 400),
        "liver": (30, 150),
        "bone": (400, 1800),
        "brain": (40, 80),
        "stroke": (40, 40),
    }


def test_windows_become_channels_in_their_order():
    windows = ("lung", "bone", "brain")
    found = pixels(CT, windows)
    for channel, name in enumerate(windows):
        assert (found[..., channel] == pixels(CT, (name,) * 3)[..., 0]).all()
    assert (found[..., 0] != found[..., 2]).any()


def test_depth_is_kept_until_the_window(tmp_path):
    ramp = np.arange(4096).reshape(64, 64)
    narrow = write(tmp_path / "a.dcm", array=ramp, WindowCenter=1000 - 1024, WindowWidth=256)
    assert set(pixels(narrow).reshape(-1)) == set(range(256))


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("coded", [list, lambda table: np.array(table, "<u2").tobytes()])
def test_own_table_of_values(tmp_path, bits, coded):
    table, shown = Dataset(), [0, 2**bits - 1, 2 ** (bits - 1), 0]
    table.LUTDescriptor, table.LUTData = [4, 1, bits], coded(shown)
    table["LUTData"].VR = "US" if coded is list else "OW"
    stored = np.array([[0, 1], [2, 3], [4, 9]])  # before and after the table: its ends
    path = write(tmp_path / "a.dcm", array=stored, RescaleIntercept=0, VOILUTSequence=[table])
    assert pixels(path)[..., 0].tolist() == [[0, 0], [255, 128], [0, 0]]
    write(path, path, PhotometricInterpretation="MONOCHROME1")
    assert pixels(path)[..., 0].tolist() == [[255, 255], [0, 127], [255, 255]]


def test_table_of_packed_bytes(tmp_path):
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4, 0, 8], bytes([0, 200, 100, 255])
    table["LUTData"].VR = "OW"
    path = write(tmp_path / "a.dcm", array=np.array([[0, 1], [2, 3]]), RescaleIntercept=0,
                 VOILUTSequence=[table])  # fmt: skip
    assert pixels(path)[..., 0].tolist() == [[0, 200], [100, 255]]


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_every_function_of_a_window_is_highdicoms(tmp_path, function):
    path = write(tmp_path / "a.dcm", WindowCenter=40, WindowWidth=400, VOILUTFunction=function)
    grey = highdicom.imread(path).get_frame(1, apply_voi_transform=True)
    assert np.abs(pixels(path)[..., 0] - grey * 255).max() < 0.5 + 1e-6


def test_an_enhanced_file_keeps_its_window_by_frame(tmp_path):
    stored = np.arange(3 * 256).reshape(3 * 16, 16)
    groups = []
    for center in (0, 100, 200):
        group, window, rescale = Dataset(), Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth = center, 300
        rescale.RescaleSlope, rescale.RescaleIntercept = 1, -center
        group.FrameVOILUTSequence, group.PixelValueTransformationSequence = [window], [rescale]
        groups.append(group)
    path = write(tmp_path / "a.dcm", array=stored, NumberOfFrames=3, Rows=16, RescaleSlope=None,
                 RescaleIntercept=None, PerFrameFunctionalGroupsSequence=groups)  # fmt: skip
    middle = np.arange(256, 512).reshape(16, 16) - 100
    assert (pixels(path)[..., 0] == np.rint(255 * linear(middle, 100, 300))).all()


def test_a_constant_image_is_black(tmp_path):
    assert not pixels(write(tmp_path / "a.dcm", array=np.full((4, 4), 7))).any()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"template": MR}, "data.windows is for CT"),
        ({"RescaleSlope": None, "RescaleIntercept": None}, "not in Hounsfield units"),
    ],
)
def test_windows_are_for_hounsfield_units(tmp_path, changes, reason):
    path = write(tmp_path / "a.dcm", **changes)
    read_image(path)
    with pytest.raises(InputError, match=reason):
        read_image(path, windows=("lung", "bone", "brain"))


def test_windows_are_of_hounsfield_units_whatever_the_polarity(tmp_path):
    windows = ("lung", "bone", "brain")
    inverted = write(tmp_path / "x.dcm", PhotometricInterpretation="MONOCHROME1")
    assert (pixels(inverted, windows) == pixels(CT, windows)).all()


def test_windows_are_for_dicom(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png.*data\.windows is for DICOM"):
        check_images([tmp_path / "a.png"], ("lung", "bone", "brain"))
    with pytest.raises(InputError, match=r"data\.windows=lung,bone,brain: digits is not DICOM"):
        open_source(DataConfig(name="digits", windows=("lung", "bone", "brain")))


def bad(path, kind):
    whole = write(path, **SECRETS).read_bytes()
    if kind == "unknown syntax":
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = UID("1.2.826.0.1.3680043.8.498.1")
        path.write_bytes(b"")
        pydicom.dcmwrite(path, dataset, implicit_vr=False, little_endian=True)
    elif kind == "damaged number":
        path.write_bytes(whole.replace(b"-1024 ", b"SECRET"))
    else:
        path.write_bytes(
            {
                "cut pixels": whole[:-1000],
                "cut header": whole[:600],
                "encrypted": b"\x30\x82\x10\x00" + np.random.default_rng(0).bytes(4000),
                "empty": b"",
            }[kind]
        )
    return path


BAD = ["cut pixels", "cut header", "encrypted", "empty", "unknown syntax", "damaged number"]


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_named_in_one_line_without_their_headers(tmp_path, kind, capfd):
    path = bad(tmp_path / "scan.dcm", kind)
    for read in (read_image, lambda path: check_images([path])):
        with pytest.raises(InputError, match=r"scan\.dcm") as caught:
            read(path)
        said = str(caught.value) + "".join(capfd.readouterr())
        assert "\n" not in str(caught.value)
        assert not any(value in said for value in [*SECRETS.values(), "SECRET"])
    assert dicom.patient(path)  # nor does grouping stop at it


def test_values_that_break_the_standard_are_not_printed(tmp_path):
    path = write(tmp_path / "scan.dcm", PatientID="", StudyInstanceUID="1.2.3.4.5")
    path.write_bytes(path.read_bytes().replace(b"1.2.3.4.5", b"SECRET-ID"))
    code = (
        "import sys; from pathlib import Path; from vpt.data.dicom import patient, read_frame\n"
        "assert patient(Path(sys.argv[1])).startswith('SECRET')\n"
        "read_frame(Path(sys.argv[1]))"
    )
    swig = "-Wignore:builtin type:DeprecationWarning"  # as an older GDCM is imported
    command = [sys.executable, "-Wdefault", swig, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    dicom._pydicom.cache_clear()
    for call in (read_image, dicom.patient, lambda path: check_images([path])):
        with pytest.raises(InputError, match=r"^DICOM needs .*: pip install '.*\[medical\]'$"):
            call(CT)


def test_files_are_found_by_suffix_or_content(tmp_path):
    for name in ("IM0001", "1.2.840.113", "b.dcm", "c.DICOM"):
        scan(tmp_path / name, "p")
    for name in ("DICOMDIR", "notes", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "DICOMDIR").write_bytes((SHIPPED / "dicomdirtests/DICOMDIR").read_bytes())
    names = list(search(tmp_path).images)
    assert names == ["1.2.840.113", "IM0001", "b.dcm", "c.DICOM"]


def write_patients(root, patients=6, each=2, classes=("benign", "malignant")):
    for label, name in enumerate(classes):
        for i in range(patients):
            for k in range(each):
                number = (label * patients + i) * each + k
                scan(root / name / f"{number:03d}.dcm", f"MRN-{label}{i}", number)
    return root


def test_patients_of_a_folder_are_those_of_the_headers(tmp_path):
    source = open_source(DataConfig(root=write_patients(tmp_path)))
    patients = source.parts["all"].patients
    assert len(set(patients)) == 12 and patients[:2] == ["patient of benign/000.dcm"] * 2
    assert "MRN" not in repr(source)
    split = split_shots(source, 2, seed=1, calibration=2)
    groups = [set(s.patients) for s in (split.train, split.calibration, split.test)]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])


def test_without_an_id_the_study_groups(tmp_path):
    for i, study in enumerate(["1.2.1", "1.2.1", "1.2.2"]):
        for name in ("a", "b"):
            scan(tmp_path / name / f"{i}.dcm", "", i, StudyInstanceUID=study)
    patients = open_source(DataConfig(root=tmp_path)).parts["all"].patients
    assert len(set(patients)) == 2


def test_a_patient_in_two_parts_is_named_by_files(tmp_path):
    for part, patients in (("train", "abc"), ("test", "cde")):
        for i, patient in enumerate(patients):
            for label, name in enumerate(("x", "y")):
                scan(tmp_path / part / name / f"{i}.dcm", f"MRN-{label}{patient}", i)
    with pytest.raises(InputError) as caught:
        split_shots(open_source(DataConfig(root=tmp_path)), 1, seed=1)
    assert "2 patients are in both test and train: patient of test/x/0.dcm, " in str(caught.value)
    assert "MRN" not in str(caught.value)


def test_a_mixed_folder_hides_patients(tmp_path):
    write_patients(tmp_path)
    Image.new("L", (4, 4)).save(tmp_path / "benign/x.png")
    with pytest.raises(InputError, match=r"24 of 25 images of all are DICOM, first .*000\.dcm"):
        open_source(DataConfig(root=tmp_path))


def test_a_csv_takes_its_own_patients_first(tmp_path):
    write_patients(tmp_path, patients=2, each=1)
    rows = [f"{path.relative_to(tmp_path).as_posix()},{path.parent.name}" for path in
            sorted(tmp_path.glob("*/*.dcm"))]  # fmt: skip
    (tmp_path / "plain.csv").write_text("\n".join(["path,label", *rows]))
    (tmp_path / "own.csv").write_text("\n".join(["path,label,patient", *(f"{r},p" for r in rows)]))
    plain = open_source(DataConfig(root=tmp_path / "plain.csv")).parts["all"]
    own = open_source(DataConfig(root=tmp_path / "own.csv")).parts["all"]
    assert len(set(plain.patients)) == 4 and set(own.patients) == {"p"}


def test_windows_go_with_the_samples(tmp_path):
    config = {"root": write_patients(tmp_path), "windows": ["lung", "bone", "brain"]}
    samples = open_source(DataConfig(**config)).parts["all"]
    plain = open_source(DataConfig(root=tmp_path)).parts["all"]
    assert isinstance(samples, Samples)
    windowed = np.asarray(samples.take([3]).read(0))
    assert (windowed == pixels(samples.images[3], samples.windows)).all()
    assert (windowed != np.asarray(plain.read(3))).any()
    assert samples.content_hash() != plain.content_hash()
    joined = samples.take([0, 1]).join(samples.take([3]))
    assert (np.asarray(joined.read(2)) == windowed).all()

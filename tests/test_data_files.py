"""DICOM, GeoTIFF and volumes: what is read of them, by whom, and what is said of those that are damaged."""

import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_mim.data.arguments import DataArguments
from hf_mim.data.images import BrokenImageError
from hf_mim.data.loading import load_all_images, load_images
from hf_mim.data.sources.dicom import apply_window
from hf_mim.jobs import check, embed, pretraining
from tiny_training import FLAGS

RAMP = np.arange(64, dtype=np.uint16).reshape(8, 8)


def args(root, **kwargs):
    return DataArguments(train_dir=str(root), **kwargs)


def write_dicom(path, pixels, patient="p", syntax=None, **fields):
    """A file of secondary capture; `pixels` (height, width), (frames, height, width) or (height, width, 3)."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    path.parent.mkdir(parents=True, exist_ok=True)
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    data = pydicom.Dataset()
    data.file_meta, data.PatientID = meta, patient
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    colour = pixels.shape[-1] == 3
    data.SamplesPerPixel, data.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        data.PlanarConfiguration = 0
    elif pixels.ndim == 3:
        data.NumberOfFrames = len(pixels)
    data.Rows, data.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
    data.BitsAllocated = data.BitsStored = 8 * pixels.dtype.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(pixels.dtype.kind == "i")
    data.PixelData = pixels.tobytes()
    for name, value in fields.items():
        setattr(data, name, value)
    if syntax is not None:
        data.compress(syntax, generate_instance_uid=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.save_as(path, enforce_file_format=True)
    return path


def write_scene(path, bands, nodata=None):
    """A GeoTIFF of (bands, height, width)."""
    rasterio = pytest.importorskip("rasterio")
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = {"count": len(bands), "height": bands.shape[1], "width": bands.shape[2]}
    place = rasterio.transform.from_origin(500_000, 4_600_000, 10, 10)
    with rasterio.open(
        path, "w", driver="GTiff", dtype=bands.dtype, nodata=nodata, crs="EPSG:32633", transform=place, **sizes
    ) as file:
        file.write(bands)
    return path


def write_nifti(path, volume):
    nibabel = pytest.importorskip("nibabel")
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)
    return path


def only(root, **kwargs):
    """The images of a folder, all as arrays."""
    images = load_all_images(args(root, **({"num_channels": 1} | kwargs)))
    return images, [images[index].numpy() for index in range(len(images))]


# --- DICOM


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        # The standard's example: 0 up to 2048 - 0.5 - 4095 / 2, 1 from 2048 - 0.5 + 4095 / 2.
        ((2048, 4096, "LINEAR"), [0, 2047.5 / 4095, 1, 1]),
        ((2048, 4096, "LINEAR_EXACT"), [0, 2047.5 / 4096, 4095 / 4096, 1]),
        ((2047.5, 1, "LINEAR"), [0, 1, 1, 1]),
        ((2047.5, 4096, "SIGMOID"), [1 / (1 + np.exp(4 * 2047.5 / 4096)), 0.5, None, None]),
    ],
)
def test_windows_by_hand(window, expected):
    found = apply_window(np.array([0, 2047.5, 4095, 5000], dtype=np.float32), *window)
    for value, wanted in zip(found, expected, strict=True):
        assert wanted is None or abs(value - wanted) < 1e-6
    with pytest.raises(ValueError, match="of width 0"):
        apply_window(found, 1, 0)


def test_what_a_grey_dicom_shows(tmp_path):
    write_dicom(tmp_path / "a.dcm", RAMP)
    write_dicom(tmp_path / "b.dcm", RAMP, BitsStored=12, HighBit=11)
    write_dicom(tmp_path / "c.dcm", RAMP, WindowCenter=[32.5, 1000], WindowWidth=[65, 1])
    write_dicom(tmp_path / "d.dcm", RAMP, RescaleSlope=2, RescaleIntercept=-10, WindowCenter=54.5, WindowWidth=129)
    write_dicom(tmp_path / "e.dcm", RAMP, PhotometricInterpretation="MONOCHROME1", WindowCenter=32.5, WindowWidth=65)
    write_dicom(tmp_path / "f.dcm", RAMP.astype(np.int16) - 32)
    images, (a, b, c, d, e, f) = only(tmp_path)
    assert images[0].dtype == torch.float32 and a.shape == (1, 8, 8)
    ramp = RAMP[None].astype(np.float64)
    np.testing.assert_allclose(a, ramp / 65535, atol=1e-6)
    np.testing.assert_allclose(b, ramp / 4095, atol=1e-6)
    np.testing.assert_allclose(c, ramp / 64, atol=1e-6)
    np.testing.assert_allclose(d, (2 * ramp - 10 - 54) / 128 + 0.5, atol=1e-6)
    np.testing.assert_allclose(e, 1 - ramp / 64, atol=1e-6)
    np.testing.assert_allclose(f, (ramp - 32 + 32768) / 65535, atol=1e-6)
    # A range of one's own goes before the file's window, and after its slope.
    _, ranged = only(tmp_path, value_range=[0, 20])
    np.testing.assert_allclose(ranged[3], ((2 * ramp - 10) / 20).clip(0, 1), atol=1e-6)


def test_frames_are_images_with_their_own_windows(tmp_path):
    pydicom = pytest.importorskip("pydicom")

    def item(**fields):
        data = pydicom.Dataset()
        for name, value in fields.items():
            setattr(data, name, value)
        return data

    frames = np.stack([RAMP, RAMP, RAMP])
    windows = [
        item(FrameVOILUTSequence=[item(WindowCenter=0.5 + half, WindowWidth=1 + 2 * half)]) for half in (4, 32, 8)
    ]
    slope = item(PixelValueTransformationSequence=[item(RescaleSlope=2, RescaleIntercept=0)])
    write_dicom(
        tmp_path / "a.dcm",
        frames,
        PerFrameFunctionalGroupsSequence=windows,
        SharedFunctionalGroupsSequence=[slope],
    )
    images, found = only(tmp_path)
    assert len(found) == 3 and images.name(1) == f"{tmp_path}/a.dcm (frame 1)"
    for image, half in zip(found, (4, 32, 8), strict=True):
        np.testing.assert_allclose(image[0], (2.0 * RAMP / (2 * half)).clip(0, 1), atol=1e-6)


def test_colour_and_compressed_dicom(tmp_path):
    pytest.importorskip("pydicom")
    from pydicom.uid import RLELossless

    colour = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    write_dicom(tmp_path / "a.dcm", colour)
    write_dicom(tmp_path / "b.dcm", colour[..., 0], syntax=RLELossless)
    _, (rgb, grey) = only(tmp_path, num_channels=3)
    np.testing.assert_allclose(rgb, colour.transpose(2, 0, 1) / 255, atol=1e-6)
    np.testing.assert_allclose(grey, np.broadcast_to(colour[..., 0] / 255, (3, 8, 8)), atol=1e-6)


def test_pixels_that_nothing_installed_decodes(tmp_path, monkeypatch):
    pytest.importorskip("pydicom")
    from pydicom.pixels import get_decoder
    from pydicom.uid import RLELossless

    path = write_dicom(tmp_path / "a.dcm", RAMP, syntax=RLELossless)
    monkeypatch.setattr(type(get_decoder(RLELossless)), "is_available", property(lambda self: False))
    with pytest.raises(ValueError, match="a.dcm: pixels are compressed as RLE Lossless, for which no decoder is in"):
        load_images(args(path.parent))


def test_patients_stay_on_one_side(tmp_path):
    for patient in range(5):
        for n in range(1 + patient):
            write_dicom(tmp_path / f"{patient}" / f"{n}.dcm", RAMP, patient=f"p{patient}")
    images = load_images(args(tmp_path, num_channels=1, group_by="PatientID", validation_fraction=0.3))
    sides = [{images_of.name(i).split("/")[-2] for i in range(len(images_of))} for images_of in vars(images).values()]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 5
    assert len(images.train) + len(images.validation) == 15 and 0.3 <= len(images.validation) / 15 < 0.6
    # A folder a patient is none a class.
    assert images.train.labels == {}
    assert load_images(args(tmp_path, num_channels=1)).train.label_names == {"label": list("01234")}
    (tmp_path / "0").rename(tmp_path / "train")
    for patient in range(1, 5):
        (tmp_path / f"{patient}").rename(tmp_path / "train" / f"{patient}")
    write_dicom(tmp_path / "val" / "0.dcm", RAMP, patient="p3")
    with pytest.raises(ValueError, match="--group_by PatientID: 1 are in both .*train and .*val, p3 among them"):
        load_images(args(tmp_path, group_by="PatientID"))
    write_dicom(tmp_path / "val" / "0.dcm", RAMP, patient="")
    with pytest.raises(ValueError, match="--group_by PatientID: .*val/0.dcm does not tell it"):
        load_images(args(tmp_path, group_by="PatientID"))


# --- scenes


def test_tiles_of_scenes(tmp_path):
    scene = np.arange(4 * 20 * 33, dtype=np.uint16).reshape(4, 20, 33)
    scene[:, :8, 8:16] = 0  # one tile without anything
    scene[1, 2:4, 0:2] = 0
    write_scene(tmp_path / "a.tif", scene, nodata=0)
    scene[0, 0, 0] = 1
    images, tiles = only(tmp_path, tile_size=8, bands=[4, 2], num_channels=2)
    names = [images.name(index) for index in range(len(images))]
    corners = [(row, column) for row in (0, 8, 12) for column in (0, 8, 16, 24, 25) if (row, column) != (0, 8)]
    assert names == [f"{tmp_path}/a.tif (tile at row {row}, column {column})" for row, column in corners]
    for tile, (row, column) in zip(tiles, corners, strict=True):
        wanted = scene[[3, 1], row : row + 8, column : column + 8].astype(np.float64)
        known = np.where(wanted == 0, np.nan, wanted)
        wanted = np.where(np.isnan(known), np.floor(np.nanmean(known, axis=(1, 2), keepdims=True)), wanted)
        np.testing.assert_allclose(tile, wanted / 65535, atol=1e-6)
    # Every pixel is in some tile, and a range of its own is taken.
    _, ranged = only(tmp_path, tile_size=64, bands=[1], value_range=[100, 200])
    assert len(ranged) == 1 and ranged[0].shape == (1, 20, 33)
    assert ranged[0].min() == 0 and ranged[0].max() == 1
    # Tiles of one scene alone are split; of several, scenes are.
    assert len(load_images(args(tmp_path, tile_size=8)).validation) == 1
    write_scene(tmp_path / "b.tif", scene)
    splits = load_images(args(tmp_path, tile_size=8, num_channels=4))
    assert {len(splits.train), len(splits.validation)} == {14, 15}


def test_only_the_window_is_read(tmp_path, monkeypatch):
    rasterio = pytest.importorskip("rasterio")
    write_scene(tmp_path / "a.tif", np.ones((1, 64, 64), dtype=np.float32))
    images = load_all_images(args(tmp_path, num_channels=1, tile_size=16))
    sizes, read = [], rasterio.io.DatasetReader.read

    def counted(self, *positional, **kwargs):
        found = read(self, *positional, **kwargs)
        sizes.append(found.shape)
        return found

    monkeypatch.setattr("rasterio.open", lambda path: _Counted(rasterio.io.DatasetReader(path), counted))
    assert images[5].shape == (1, 16, 16)
    assert sizes == [(1, 16, 16)]


class _Counted:
    def __init__(self, file, read):
        self.file, self.counted = file, read

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def read(self, *positional, **kwargs):
        return self.counted(self.file, *positional, **kwargs)


# --- volumes


def test_slices_of_volumes(tmp_path):
    volume = np.random.default_rng(0).random((5, 6, 7), dtype=np.float32)
    write_nifti(tmp_path / "a" / "v.nii", volume)
    write_nifti(tmp_path / "a" / "w.nii.gz", volume + 1)
    images, slices = only(tmp_path / "a")
    assert len(slices) == 14 and images.name(8) == f"{tmp_path}/a/w.nii.gz (slice 1 of axis 2)"
    for index, found in enumerate(slices):
        np.testing.assert_array_equal(found[0], volume[:, :, index % 7] + index // 7)
    _, slices = only(tmp_path / "a", slice_axis=1)
    np.testing.assert_array_equal(slices[3][0], volume[:, 3])
    splits = load_images(args(tmp_path / "a", num_channels=1))
    assert len({splits.validation.name(i).split(" ")[0] for i in range(7)}) == 1  # whole volumes

    stack = (1000 * volume).astype(np.uint16)
    (tmp_path / "b").mkdir()
    np.save(tmp_path / "b" / "s.npy", stack)
    _, slices = only(tmp_path / "b", slice_axis=0)
    np.testing.assert_allclose(np.concatenate(slices), stack / 65535, atol=1e-6)
    np.save(tmp_path / "b" / "s.npy", np.stack([stack, stack + 1], axis=-1))
    _, slices = only(tmp_path / "b", slice_axis=2, num_channels=2)
    np.testing.assert_allclose(slices[6], np.stack([stack[:, :, 6], stack[:, :, 6] + 1]) / 65535, atol=1e-6)


def test_signed_integers_need_a_range(tmp_path):
    volume = np.arange(-60, 60, dtype=np.int16).reshape(4, 5, 6)
    write_nifti(tmp_path / "a.nii", volume)
    with pytest.raises(ValueError, match=r"a.nii \(slice 0 of axis 2\): values of type int16.*--value_range LOW HIGH"):
        load_all_images(args(tmp_path, num_channels=1))[0]
    _, slices = only(tmp_path, value_range=[-60, 0])
    np.testing.assert_allclose(slices[1][0], ((volume[:, :, 1] + 60) / 60).clip(0, 1), atol=1e-6)


# --- what is wrong


def broken_dicom(root):
    whole = write_dicom(root / "a.dcm", RAMP).read_bytes()
    (root / "cut.dcm").write_bytes(whole[:-40])
    (root / "header.dcm").write_bytes(whole[:-200])
    (root / "no.dcm").write_bytes(b"not at all")
    pixels = write_dicom(root / "report.dcm", RAMP)
    pydicom = pytest.importorskip("pydicom")
    report = pydicom.dcmread(pixels)
    del report.PixelData
    report.save_as(pixels)
    return {
        "cut": "broken or cut off",
        "header": "cut off",
        "no": "cannot be read as DICOM",
        "report": "no pixel data",
    }


def broken_scenes(root):
    whole = write_scene(root / "a.tif", np.ones((1, 32, 32), dtype=np.uint8)).read_bytes()
    (root / "cut.tif").write_bytes(whole[: len(whole) // 2])
    (root / "no.tif").write_bytes(b"not at all")
    return {"cut": "", "no": "cannot be read as GeoTIFF"}


def broken_volumes(root):
    volume = np.ones((4, 4, 3), dtype=np.float32)
    whole = write_nifti(root / "a.nii", volume).read_bytes()
    (root / "cut.nii").write_bytes(whole[:-100])
    (root / "no.nii").write_bytes(b"not at all")
    write_nifti(root / "flat.nii", volume[:, :, 0])
    np.save(root / "objects.npy", np.array([np.ones(2), np.ones(3)], dtype=object), allow_pickle=True)
    np.save(root / "cut.npy", volume)
    (root / "cut.npy").write_bytes((root / "cut.npy").read_bytes()[:-10])
    np.save(root / "nan.npy", volume * np.nan)
    return {
        "cut.nii": "broken or cut off",
        "no": "cannot be read as a volume",
        "flat": "expected three axes",
        "objects": "slices of other sizes",
        "cut.npy": "cannot be read as a volume",
        "nan": "not finite",
    }


@pytest.mark.parametrize(
    ("make", "flags"),
    [
        (broken_dicom, []),
        (broken_scenes, ["--tile_size=32"]),
        (broken_volumes, ["--slice_axis=2"]),
    ],
)
def test_broken_files_are_named_and_can_be_skipped(tmp_path, capsys, make, flags):
    root = tmp_path / "data"
    root.mkdir()
    broken = make(root)
    status = check.main([str(root), "--num_workers=0", "--num_channels=1", *flags])
    said = capsys.readouterr().out
    assert status == 1
    for name, reason in broken.items():
        assert any(f"/{name}" in line and reason in line for line in said.splitlines()), (name, said)
    images = load_all_images(args(root, num_channels=1, **dict(_flag(flag) for flag in flags)))
    read = 0
    for index in range(len(images)):
        try:
            assert images[index].shape[0] == 1
            read += 1
        except BrokenImageError as error:
            assert str(root) in str(error)
    assert read >= 1


def _flag(flag: str):
    name, _, value = flag.removeprefix("--").partition("=")
    return name, int(value)


def test_scenes_of_other_bands(tmp_path):
    write_scene(tmp_path / "a.tif", np.ones((3, 8, 8), dtype=np.uint8))
    write_scene(tmp_path / "b.tif", np.ones((4, 8, 8), dtype=np.uint8))
    with pytest.raises(ValueError, match="b.tif has 4 bands, and .*a.tif has 3: say by --bands"):
        load_images(args(tmp_path, tile_size=8))
    with pytest.raises(ValueError, match="--bands 4 3 2: .*a.tif has 3 bands"):
        load_images(args(tmp_path, tile_size=8, bands=[4, 3, 2]))
    assert len(only(tmp_path, tile_size=8, bands=[3, 2], num_channels=None)[1]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tile_size": 0}, "--tile_size must be at least 1"),
        ({"bands": [1]}, "give --tile_size too"),
        ({"bands": [0], "tile_size": 8}, "counted from 1"),
        ({"bands": [1, 2], "tile_size": 8, "num_channels": 3}, "names 2 bands, and --num_channels is 3"),
        ({"slice_axis": 3}, "--slice_axis must be 0, 1 or 2"),
        ({"value_range": [1, 1]}, "--value_range must be two numbers, the lower first"),
        ({"value_range": [1]}, "--value_range must be two numbers"),
    ],
)
def test_flags_that_cannot_be_meant(flags, message):
    with pytest.raises(ValueError, match=message):
        args("x", **flags)


def test_flags_of_other_files(tmp_path):
    with pytest.raises(ValueError, match="--group_by is of dicom files; the data is read as scenes"):
        load_images(DataArguments(group_by="PatientID"))
    np.save(tmp_path / "a.npy", np.ones((4, 4, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="--group_by is of dicom files; .* is read as folder"):
        load_images(args(tmp_path, group_by="PatientID"))
    with pytest.raises(ValueError, match="--value_range is of geotiff or volumes or dicom files"):
        load_images(args(tmp_path, value_range=[0, 1]))
    with pytest.raises(ValueError, match="--group_by is of dicom files; .* is read as volumes"):
        load_images(args(tmp_path, group_by="PatientID", slice_axis=0))


# --- end to end


def make_files(root, kind):
    rng = np.random.default_rng(0)
    if kind == "dicom":
        for n in range(4):
            frames = rng.integers(0, 4096, (6, 20, 24), dtype=np.uint16)
            write_dicom(root / f"{n}.dcm", frames, patient=f"p{n}", WindowCenter=2000, WindowWidth=4000)
        return ["--num_channels=1", "--group_by=PatientID"]
    if kind == "geotiff":
        for n in range(3):
            write_scene(root / f"{n}.tif", rng.integers(0, 10_000, (4, 40, 40), dtype=np.uint16), nodata=0)
        return ["--tile_size=20", "--bands=4,3,2".replace(",", "\0"), "--value_range=0\x0010000"]
    for n in range(3):
        write_nifti(root / f"{n}.nii", rng.random((20, 24, 5), dtype=np.float32))
    return ["--num_channels=1"]


def spread(flags):
    """Flags of several values as the words of a command line."""
    words = []
    for flag in flags:
        name, _, values = flag.partition("=")
        words += [name, *values.split("\0")]
    return words


@pytest.mark.parametrize("kind", ["dicom", "geotiff", "volumes"])
def test_workers_read_the_same(tmp_path, kind):
    flags = make_files(tmp_path, kind)
    found = {}
    for flag in flags:
        name, _, values = flag.removeprefix("--").partition("=")
        if name == "group_by":
            found[name] = values
        else:
            numbers = [int(value) for value in values.split("\0")]
            found[name] = numbers if name in ("bands", "value_range") else numbers[0]
    images = load_all_images(args(tmp_path, **found))
    here = [images[index] for index in range(len(images))]
    loader = DataLoader(images, batch_size=None, num_workers=2)
    for one, other in zip(here, loader, strict=True):
        assert torch.equal(one, other)
    again = load_all_images(args(tmp_path, **found))
    assert again.fingerprint() == images.fingerprint() and again.content_fingerprint() == images.content_fingerprint()
    assert load_all_images(args(tmp_path, **found | {"value_range": [0, 5]})).fingerprint() != images.fingerprint()
    next(path for path in sorted(tmp_path.iterdir())).touch()
    assert again.fingerprint() != again.select(np.arange(3)).fingerprint()


@pytest.mark.parametrize(
    "kind", ["dicom", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("geotiff", "volumes"))]
)
def test_a_step_of_pretraining_and_what_follows(tmp_path, capsys, kind):
    data = [f"--train_dir={tmp_path / 'data'}", *spread(make_files(tmp_path / "data", kind))]
    run = [*data, f"--output_dir={tmp_path / 'run'}", "--max_steps=2", "--references=false", "--warmup_steps=0"]
    assert pretraining.main([*FLAGS, *run]) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()
    words = [str(tmp_path / "run"), str(tmp_path / "data"), str(tmp_path / "features.parquet")]
    assert embed.main([*words, *data[1:]]) == 0
    capsys.readouterr()

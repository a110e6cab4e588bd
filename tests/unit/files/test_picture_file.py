"""Images as people have them: upright, in their whole range, in their own colours, or refused by name."""

import io

import numpy
import pytest
from PIL import Image, ImageCms

from medsteer_core.errors import MedSteerError
from medsteer_core.files.picture_file import read_picture
from medsteer_core.judges.data import pixels

RAMP = numpy.linspace(0, 255, 16 * 24).reshape(16, 24)


def colours():
    """A picture with a corner of its own, so that every turn shows."""
    values = numpy.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1).astype(numpy.uint8)
    values[:4, :4] = 255, 0, 0
    return Image.fromarray(values)


def saved(path, picture, **options):
    picture.save(path, **options)
    return path


def difference(one, other):
    return numpy.abs(numpy.array(one).astype(int) - numpy.array(other).astype(int)).max()


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_jpeg_that_is_turned_by_exif_is_read_upright(tmp_path, turn):
    undo = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}[turn]
    stored = colours()
    for step in undo:
        stored = stored.transpose(Image.Transpose(step))
    exif = Image.Exif()
    exif[0x0112] = turn
    path = saved(tmp_path / "a.jpg", stored, exif=exif, quality=95, subsampling=0)
    found = read_picture(path)
    assert found.size == colours().size and difference(found, colours()) < 60
    assert pixels(path).shape == (3, 16, 24)  # the judge's training sees the same


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path):
    values = numpy.linspace(0, 65535, 16 * 24).reshape(16, 24).astype(numpy.uint16)
    for name in ("a.png", "a.tif"):
        found = read_picture(saved(tmp_path / name, Image.fromarray(values)))
        assert difference(found, Image.fromarray(RAMP.round().astype(numpy.uint8)).convert("RGB")) <= 1


def test_cmyk_goes_through_its_profile_where_it_has_one(tmp_path):
    plain = read_picture(saved(tmp_path / "a.jpg", colours().convert("CMYK"), quality=100, subsampling=0))
    assert difference(plain, colours()) < 30
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = saved(tmp_path / "b.jpg", colours().convert("CMYK"), icc_profile=profile)
    with pytest.raises(MedSteerError, match="b.jpg' is not a readable image"):  # a profile of other channels
        read_picture(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_black(tmp_path, mode):
    picture = colours().convert(mode)
    picture.putalpha(Image.fromarray(numpy.where(RAMP > 100, 255, 0).astype(numpy.uint8)))
    found = numpy.array(read_picture(saved(tmp_path / "a.png", picture)))
    assert not found[RAMP <= 100].any()
    assert (found[RAMP > 100] == numpy.array(colours().convert(mode).convert("RGB"))[RAMP > 100]).all()


def test_a_palette_is_read_as_its_colours(tmp_path):
    picture = colours().quantize(16)
    for name, options in (("a.png", {}), ("b.png", {"transparency": 3}), ("c.gif", {})):
        found = numpy.array(read_picture(saved(tmp_path / name, picture, **options)))
        wanted = numpy.array(picture.convert("RGB"))
        if options:
            wanted[numpy.array(picture) == 3] = 0
        assert (found == wanted).all()


def test_several_frames_are_refused(tmp_path):
    for name in ("a.gif", "a.tif", "a.png"):
        path = saved(tmp_path / name, colours(), save_all=True, append_images=[colours().rotate(180)])
        with pytest.raises(MedSteerError, match=f"{name}' holds 2 frames; an image of one was expected"):
            read_picture(path)


@pytest.mark.parametrize("values", [numpy.float32(RAMP), numpy.int32(RAMP * 1000), numpy.int32(RAMP - 10)])
def test_numbers_without_a_range_are_refused(tmp_path, values):
    with pytest.raises(MedSteerError, match="nothing tells their range"):
        read_picture(saved(tmp_path / "a.tif", Image.fromarray(values)))


def test_files_that_are_none_or_cut_short_are_named(tmp_path):
    whole = io.BytesIO()
    colours().save(whole, "PNG")
    for name, data in (("empty.png", b""), ("text.png", b"hello"), ("cut.png", whole.getvalue()[:-40])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MedSteerError, match=f"{name}' is not a readable image"):
            read_picture(tmp_path / name)
        with pytest.raises(MedSteerError, match="'its name' is not a readable image"):
            read_picture(data, "its name")
    with pytest.raises(MedSteerError, match="nowhere.png"):
        read_picture(tmp_path / "nowhere.png")


@pytest.mark.parametrize("name", ["it's.png", 'a "b".png', "two\nlines.png", "ärzte 图.png"])
def test_names_of_all_kinds_are_read_and_told_in_one_line(tmp_path, name):
    assert read_picture(saved(tmp_path / name, colours())).size == (24, 16)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(MedSteerError) as told:
        read_picture(tmp_path / name)
    assert "\n" not in str(told.value)


def test_a_very_long_picture_is_read_whole(tmp_path):
    picture = Image.fromarray(numpy.tile(RAMP.astype(numpy.uint8)[:10, :1], (1, 10_000)))
    assert read_picture(saved(tmp_path / "a.png", picture)).size == (10_000, 10)

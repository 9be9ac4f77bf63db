"""A picture is the same pixels everywhere: what a person sees."""

import base64
import errno
import io
import os
import struct
import subprocess

import numpy as np
import pytest
from PIL import Image, ImageOps

import images
import launch
from data import Row
from images import BadImage, decode_image, image_size, open_image, usable_rows


def noise(width=40, height=24, channels=3):
    shape = (height, width, channels)[: 2 + (channels > 1)]
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_turned_as_pillow_turns(kind, turn):
    """Decoded as exif_transpose has it; the header says the size that the decoder gives."""
    exif = Image.Exif()
    exif[0x0112] = turn
    content = saved(noise(), kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert np.array_equal(decode_image(content), upright)
    assert image_size(content) == upright.size


def test_no_picture_starts_a_program(tmp_path, monkeypatch):
    """PostScript would: it is no picture to us, whatever its name."""
    path = tmp_path / "photo.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n")
    monkeypatch.setattr(subprocess, "Popen", None)
    assert Image.open(path).format == "EPS"
    for read in (open_image, image_size):
        with pytest.raises(SystemExit, match="not a usable image"):
            read(path)


@pytest.mark.parametrize("turn", [0, 9, 99])
def test_a_tag_that_says_nothing_turns_nothing(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    content = saved(noise(), "PNG", exif=exif)
    assert image_size(content) == decode_image(content).size == (40, 24)


def over_white(colour, alpha):
    """Alpha compositing on white, by the formula."""
    return (colour * (alpha / 255.0) + 255 * (1 - alpha / 255.0)).round()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_white(mode):
    n = len(mode)
    pixels = np.random.default_rng(1).integers(0, 256, (9, 9, n), dtype=np.uint8)
    decoded = np.asarray(decode_image(saved(Image.fromarray(pixels, mode))), dtype=float)
    expected = over_white(pixels[..., :-1].astype(float), pixels[..., -1:])
    assert np.abs(decoded - expected).max() <= 1


def test_a_transparent_palette_is_white():
    image = noise().quantize(8)
    clear = image.getpixel((0, 0))
    decoded = np.asarray(decode_image(saved(image, transparency=clear)))
    indices = np.asarray(image)
    assert (decoded[indices == clear] == 255).all()
    shown = np.asarray(image.convert("RGB"))
    assert np.array_equal(decoded[indices != clear], shown[indices != clear])


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
RANGES = {  # one picture in many number formats
    "8 bits": (Image.fromarray(GREY), "PNG"),
    "16 bits": (Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"),
    "32 bits": (Image.fromarray(GREY.astype(np.int32) * 257), "TIFF"),
    "floats of 1": (Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"),
    "floats of 255": (Image.fromarray(GREY.astype(np.float32)), "TIFF"),
    "any floats": (Image.fromarray(GREY.astype(np.float32) * 3e4 - 5e5), "TIFF"),
}


@pytest.mark.parametrize("name", RANGES)
def test_ranges_are_scaled(name):
    decoded = np.asarray(decode_image(saved(*RANGES[name])), dtype=int)
    assert np.abs(decoded - GREY[..., None]).max() <= 1


def test_other_modes_are_what_pillow_shows():
    for image, kind in ((noise().convert("CMYK"), "JPEG"), (noise().quantize(16), "PNG")):
        content = saved(image, kind)
        shown = Image.open(io.BytesIO(content)).convert("RGB")
        assert np.array_equal(decode_image(content), shown)


def test_sources_are_one(tmp_path):
    """A path, bytes, and a data URI, its base64 broken into lines or not."""
    content = saved(noise())
    path = tmp_path / "größe a, b.png"
    path.write_bytes(content)
    text = base64.encodebytes(content).decode()
    uris = [f"data:image/png;base64,{text}", "data:image/png;base64," + text.replace("\n", "")]
    for source in (path, str(path), content, *uris):
        assert np.array_equal(open_image(source), noise())
        assert image_size(source) == (40, 24)


def without_palette():
    """A palette PNG whose PLTE chunk (length, name, bytes, checksum) is gone."""
    content = saved(noise().convert("P"))
    at = content.index(b"PLTE")
    size = int.from_bytes(content[at - 4 : at], "big")
    return content[: at - 4] + content[at + 4 + size + 4 :]


BROKEN = {
    "no palette": without_palette(),
    "cut off": saved(noise(400, 400))[:2000],
    "narrow": saved(noise(2020, 10)),
    "empty": b"",
    "text": b"<html>not found</html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_unusable_pictures_are_named(tmp_path, name):
    path = tmp_path / "a.png"
    path.write_bytes(BROKEN[name])
    with pytest.raises(BadImage):
        decode_image(path)
    with pytest.raises(SystemExit, match="a.png: not a usable image"):
        open_image(path)


def test_all_unusable_pictures_are_listed_once(tmp_path, monkeypatch, capsys):
    rows = []
    for n, content in enumerate([saved(noise()), *BROKEN.values(), saved(noise())]):
        (tmp_path / f"{n}.png").write_bytes(content)
        row = Row(id=str(n), images=[str(tmp_path / f"{n}.png")])
        row.where = f"data.jsonl:{n}"
        rows.append(row)
    with pytest.raises(SystemExit) as e:
        usable_rows(rows, leave_out=False)
    assert all(f"data.jsonl:{n}: {tmp_path}/{n}.png" in str(e.value) for n in range(1, 7))
    assert "6 unusable images" in str(e.value)

    decode, again = images.decode_image, []

    def counted(source):
        again.append(source)
        return decode(source)

    monkeypatch.setattr(images, "decode_image", counted)
    assert list(usable_rows(rows, leave_out=True)) == [rows[0], rows[-1]]
    assert "left out 6 rows" in capsys.readouterr().out
    assert len(again) == 6  # what can be used is remembered; what cannot may have been mended


ALPHA = np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16)
SEE_THROUGH = {  # a picture with something to see through, and the colour of one clear place
    "one grey of L": (Image.fromarray(GREY), "PNG", {"transparency": 7}, (7, 0)),
    "one colour of RGB": (noise(), "PNG", {"transparency": noise().getpixel((3, 2))}, (3, 2)),
    "a bit": (Image.fromarray(GREY > 99), "PNG", {"transparency": 0}, (0, 0)),
    "a GIF": (noise().quantize(4), "GIF", {"transparency": noise().quantize(4).getpixel((5, 5))})
    + ((5, 5),),
    "a WebP": (Image.merge("RGBA", [*noise(16, 16).split(), Image.fromarray(ALPHA)]), "WEBP")
    + ({"lossless": True, "exact": True}, (0, 0)),
}


@pytest.mark.parametrize("name", SEE_THROUGH)
def test_what_lies_under_a_clear_place_is_not_seen(name):
    image, kind, options, clear = SEE_THROUGH[name]
    decoded = decode_image(saved(image, kind, **options))
    assert decoded.mode == "RGB" and decoded.size == image.size
    assert decoded.getpixel(clear) == (255, 255, 255)
    shown = np.asarray(image.convert("RGB"))
    if name in ("one grey of L", "one colour of RGB", "a GIF"):  # the rest is as it was
        same = (np.asarray(decoded) == shown).all(-1) | (np.asarray(decoded) == 255).all(-1)
        assert same.all() and (shown != np.asarray(decoded)).any()


def test_a_palette_with_degrees_of_transparency():
    image = noise().quantize(4)
    degrees = bytes([0, 85, 170, 255])
    decoded = np.asarray(decode_image(saved(image, transparency=degrees)), dtype=float)
    alpha = np.array(list(degrees))[np.asarray(image)][..., None]
    shown = np.asarray(image.convert("RGB"), dtype=float)
    assert np.abs(decoded - over_white(shown, alpha)).max() <= 1


def test_big_endian_and_bilevel_pictures():
    big = Image.frombytes("I;16B", (16, 16), (GREY.astype(">u2") * 257).tobytes())
    assert np.abs(np.asarray(decode_image(saved(big, "TIFF")), int) - GREY[..., None]).max() <= 1
    bits = decode_image(saved(Image.fromarray(GREY > 99)))
    assert np.array_equal(np.asarray(bits), np.repeat((GREY > 99)[..., None] * np.uint8(255), 3, 2))


def test_a_tiff_says_how_many_bits_it_has():
    """12 of a camera, packed: two values in three bytes."""
    grey = np.arange(0, 4096, 16)[:256]
    packed = int("".join(f"{value:012b}" for value in grey), 2).to_bytes(384, "big")
    # the tags of size, bits, compression, kind, place, samples and rows
    short, long = 3, 4
    tags = [(256, short, 16), (257, short, 16), (258, short, 12), (259, short, 1), (262, short, 1)]
    tags += [(273, long, 8), (277, short, 1), (278, short, 16), (279, long, 384)]
    content = struct.pack("<2sHI", b"II", 42, 8 + len(packed)) + packed
    content += struct.pack("<H", len(tags))
    content += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    decoded = np.asarray(decode_image(content + bytes(4)), int)
    assert np.array_equal(decoded[..., 0].flatten(), grey // 16)


def test_what_grey_values_mean_is_told_by_their_range():
    """8 bits in 16 are 8, and a resampled picture of 0 to 1 may go beyond: neither turns black."""
    wide = Image.fromarray(GREY.astype(np.uint16))
    assert np.abs(np.asarray(decode_image(saved(wide)), int) - GREY[..., None]).max() <= 1
    floats = (GREY / np.float32(250)).astype(np.float32)  # up to 1.02
    decoded = np.asarray(decode_image(saved(Image.fromarray(floats), "TIFF")), int)
    assert np.abs(decoded - (floats.clip(0, 1) * 255)[..., None]).max() <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_grey_values_that_are_not_finite_are_refused(value):
    grey = GREY.astype(np.float32)
    grey[3, 3] = value
    with pytest.raises(BadImage, match="not finite"):
        decode_image(saved(Image.fromarray(grey), "TIFF"))


@pytest.mark.parametrize(
    "text", ["data:image/png;base64,%%%", "data:image/png;base64,QUJ", "data:"]
)
def test_a_data_uri_that_holds_no_picture_is_refused(text):
    for read in (open_image, image_size):
        with pytest.raises(SystemExit, match="an embedded image: not a usable image"):
            read(text)


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ESTALE])
def test_a_fault_of_the_machine_is_none_of_a_picture(tmp_path, monkeypatch, number):
    """Else a row would be left out, and a question count as wrong, for a disk that was away."""

    def broken(*args, **kwargs):
        raise OSError(number, os.strerror(number))  # of a read, which names no file

    (tmp_path / "a.png").write_bytes(saved(noise()))
    monkeypatch.setattr(images.Image, "open", broken)
    for use in (images.open_image, images.image_size, images.decode_image):
        with pytest.raises(OSError, match="a.png"):
            use(tmp_path / "a.png")
        with pytest.raises(OSError, match="an embedded image"):
            use(b"bytes")
    with pytest.raises(OSError, match="a.png"):
        usable_rows([Row({"id": "1", "images": [str(tmp_path / "a.png")]})], True)


@pytest.mark.parametrize("name", ["narrow", "empty", "text", "pointer"])
def test_a_header_that_is_none_is_named(tmp_path, name):
    """Of the other pictures the header is whole: pixels or palette are what is missing."""
    path = tmp_path / "a.png"
    path.write_bytes(BROKEN[name])
    with pytest.raises(SystemExit, match="a.png: not a usable image"):
        image_size(path)


def test_shared_and_auxiliary_pictures_are_checked_once(tmp_path, monkeypatch, capsys):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(saved(noise()) if name != "c" else b"none")
    paths = [str(tmp_path / f"{name}.png") for name in "abc"]
    rows = [Row(id=str(n), images=[paths[0]], aux_images=[paths[1]]) for n in range(5)]
    rows.append(Row(id="bad", images=[paths[0]], aux_images=[paths[2]]))
    decoded = []
    real = decode_image
    monkeypatch.setattr(images, "decode_image", lambda path: decoded.append(path) or real(path))
    assert list(usable_rows(rows, leave_out=False)) == rows  # nobody asked for the auxiliary ones
    assert capsys.readouterr().out == ""
    fields = ("images", "aux_images")
    assert list(usable_rows(rows, leave_out=True, fields=fields)) == rows[:5]
    assert sorted(decoded) == sorted(paths)


def test_ranks_share_the_pictures_and_know_all_faults(tmp_path, monkeypatch):
    """A rank opens its own alone; what it remembers of them the others read."""
    names = [str(tmp_path / f"{n}.png") for n in range(5)]
    opened = []
    monkeypatch.setattr(images, "image_fault", lambda name: opened.append(name) or "broken")
    monkeypatch.setattr(launch, "rank_and_world", lambda: (1, 2))
    monkeypatch.setattr(launch, "gathered", lambda mine: [dict.fromkeys(names[::2], "gone"), mine])
    monkeypatch.setattr(launch.dist, "is_initialized", lambda: True)
    found = launch.faults_among(names, images.image_faults)
    assert sorted(opened) == names[1::2]
    assert found == dict.fromkeys(names[::2], "gone") | dict.fromkeys(names[1::2], "broken")


def test_the_narrowest_picture_that_is_taken(tmp_path):
    """Sides of 1 to 200, as the processor has it."""
    for width, name in ((1600, "a.png"), (1601, "b.png")):
        (tmp_path / name).write_bytes(saved(noise(width, 8)))
    assert images.image_size(tmp_path / "a.png") == (1600, 8)
    with pytest.raises(SystemExit, match="aspect ratio"):
        images.image_size(tmp_path / "b.png")

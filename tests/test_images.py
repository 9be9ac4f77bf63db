"""A picture is the same pixels everywhere: what a person sees."""

import base64
import io

import numpy as np
import pytest
from PIL import Image, ImageOps

import images
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


BROKEN = {
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
    assert all(f"data.jsonl:{n}: {tmp_path}/{n}.png" in str(e.value) for n in range(1, 6))
    assert "5 unusable images" in str(e.value)

    def never(source):
        raise AssertionError("decoded again")

    monkeypatch.setattr(images, "decode_image", never)  # what was found is remembered
    assert usable_rows(rows, leave_out=True) == [rows[0], rows[-1]]
    assert "left out 5 rows" in capsys.readouterr().out

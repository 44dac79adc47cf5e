"""Images, containers and limits: every bad file is a named error before anything large is
allocated.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from data.errors import MEDIA_REASONS, DataError, MediaError
from data.media.containers import recognise
from data.media.opening import MAX_LIMIT, MediaLimits, MediaOpener
from data.question import MediaKind, MediaRef
from data.shard_writer import write_shards
from data.shards import ShardReader
from tests.support.shard_samples import png, sample

JPEG_TOLERANCE = 8  # of 255, quality 95 on a smooth picture with halved colour resolution


@pytest.fixture(scope="module")
def opener() -> Iterator[MediaOpener]:
    made = MediaOpener(MediaLimits(max_bytes=1_000_000, max_pixels=10_000))
    yield made
    made.close()


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def gradient(height: int = 20, width: int = 30) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 5, columns * 5, rows + columns], axis=-1).astype(np.uint8)


def reason_of(opener: MediaOpener, content: bytes, kind: MediaKind = "image") -> str:
    with pytest.raises(MediaError) as caught:
        opener.open(content, kind)
    assert caught.value.reason in MEDIA_REASONS
    return caught.value.reason


@pytest.mark.parametrize(
    ("image_format", "tolerance"), [("PNG", 0), ("BMP", 0), ("WEBP", 0), ("JPEG", JPEG_TOLERANCE)]
)
def test_images_are_rgb_frames(opener: MediaOpener, image_format: str, tolerance: int) -> None:
    options = {"lossless": True} if image_format == "WEBP" else {"quality": 95}
    frames = opener.open(encode(Image.fromarray(gradient()), image_format, **options), "image")
    assert frames.pixels.shape == (1, 20, 30, 3)
    assert frames.pixels.dtype == np.uint8
    assert frames.timestamps == (0.0,)
    assert np.abs(frames.pixels[0].astype(int) - gradient().astype(int)).max() <= tolerance


def test_other_modes_become_rgb(opener: MediaOpener) -> None:
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))  # invisible red
    assert opener.open(encode(clear, "PNG"), "image").pixels.min() == 255, "transparent is white"
    deep = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert (opener.open(encode(deep, "PNG"), "image").pixels == 0x80).all(), (
        "16 bits are scaled, not clipped"
    )
    assert (opener.open(encode(Image.new("L", (4, 4), 7), "PNG"), "image").pixels == 7).all()


def raw_png(depth: int, colour: int, row: bytes, width: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG file of one row, of a depth that Pillow does not write, with chunks before the
    pixels.
    """
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    framed = (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


WHITE, RED = (255, 255, 255), (255, 0, 0)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (raw_png(1, 0, b"\x80", 2), [WHITE, (0, 0, 0)]),
        (raw_png(2, 0, b"\x1b", 4), [(0, 0, 0), (85, 85, 85), (170, 170, 170), WHITE]),
        (raw_png(2, 0, b"\x10", 2, (b"tRNS", b"\0\x01")), [(0, 0, 0), WHITE]),
        (raw_png(4, 0, b"\x1f", 2, (b"tRNS", b"\0\x01")), [WHITE, WHITE]),
        (raw_png(16, 0, b"\x80\0\x12\x34", 2, (b"tRNS", b"\x12\x34")), [(128, 128, 128), WHITE]),
        (
            raw_png(16, 2, b"\x80\0\x12\x34\xff\xff" + b"\x11\0" * 3, 2, (b"tRNS", b"\x11\0" * 3)),
            [(128, 18, 255), WHITE],
        ),
        (raw_png(8, 2, b"\1\2\3\4\5\6", 2, (b"tRNS", b"\0\1\0\2\0\3")), [WHITE, (4, 5, 6)]),
        (
            raw_png(
                2,
                3,
                b"\x10",
                2,
                (b"PLTE", bytes((9, 9, 9)) + bytes((7, 8, 9))),
                (b"tRNS", b"\xff\0"),
            ),
            [(9, 9, 9), WHITE],
        ),
        (raw_png(16, 4, b"\x80\0\xff\xff" + b"\x80\0\0\0", 2), [(128, 128, 128), WHITE]),
        (raw_png(16, 6, b"\xff\0\0\0\0\0\x80\0", 1), [(255, 127, 127)]),
    ],
)
def test_every_kind_of_png(
    opener: MediaOpener, content: bytes, expected: list[tuple[int, int, int]]
) -> None:
    assert opener.open(content, "image").pixels[0, 0].tolist() == [
        list(pixel) for pixel in expected
    ]


def test_print_colours_and_grey_with_alpha(opener: MediaOpener) -> None:
    inks = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # magenta and yellow are red
    assert (
        np.abs(
            opener.open(encode(inks, "JPEG", quality=100), "image").pixels[0, 0, 0].astype(int)
            - RED
        ).max()
        <= JPEG_TOLERANCE
    )
    assert (
        opener.open(encode(Image.new("LA", (4, 4), (0, 0)), "PNG"), "image").pixels == 255
    ).all()


def test_a_long_text_in_a_png_is_no_reason_to_refuse_it(opener: MediaOpener) -> None:
    plain = encode(Image.fromarray(gradient()), "PNG")
    for is_packed in (True, False):
        text = PngImagePlugin.PngInfo()
        text.add_text("workflow", "x" * (3 << 20 if is_packed else 900_000), zip=is_packed)
        content = encode(Image.fromarray(gradient()), "PNG", pnginfo=text)
        assert (opener.open(content, "image").pixels == opener.open(plain, "image").pixels).all()


def test_animations_are_not_cut_to_their_first_picture(opener: MediaOpener) -> None:
    pictures = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 100, 200)]
    for image_format in ("PNG", "WEBP"):
        content = encode(pictures[0], image_format, save_all=True, append_images=pictures[1:])
        with pytest.raises(
            MediaError,
            match=(
                f"{image_format} is animated, got an animation of 3 pictures, expected one picture"
            ),
        ):
            opener.open(content, "image")


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\0\0\0\x18ftypavif", "AVIF"),
        (b"<?xml version='1.0'?>\n<svg width='8'/>", "SVG"),
        (b"GIF89a", "GIF, which is read as a video"),
        (b"II*\0", "TIFF"),
        (b"%PDF-1.7", "PDF"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        (b"\0\0\0\x18ftypisom", r"a video \(mp4\)"),
        (bytes(900), "zeros only"),
    ],
)
def test_formats_that_are_not_opened_are_refused_by_name(
    opener: MediaOpener, start: bytes, name: str
) -> None:
    with pytest.raises(MediaError, match=f"image: format not supported, got {name}") as caught:
        opener.open(start + bytes(900), "image")
    assert caught.value.reason == "unsupported_container"
    if "ftyp" in str(start) and "isom" not in str(start):
        with pytest.raises(MediaError, match=f"video: format not supported, got {name}"):
            opener.open(start + bytes(900), "video")


def test_bad_images_are_named(opener: MediaOpener) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)
    jpeg, packed = encode(Image.fromarray(noise), "JPEG"), encode(Image.fromarray(noise), "PNG")
    assert reason_of(opener, b"") == "empty"
    assert reason_of(opener, jpeg[: len(jpeg) // 2]) == "truncated"
    assert reason_of(opener, packed[: len(packed) // 2]) == "truncated"
    assert reason_of(opener, jpeg[: len(jpeg) // 2] + bytes(len(jpeg) // 2)) == "truncated", (
        "a download that was never finished"
    )
    assert reason_of(opener, jpeg[:20]) in ("truncated", "unreadable")
    assert reason_of(opener, packed[:8] + b"\xff" * 500) == "unreadable"
    assert (
        reason_of(opener, b"<svg xmlns='http://www.w3.org/2000/svg'/>") == "unsupported_container"
    )
    assert reason_of(opener, b"%!PS-Adobe-3.0 EPSF-3.0\n") == "unsupported_container"
    assert reason_of(opener, bytes(1_000_001)) == "oversized"
    assert reason_of(opener, encode(Image.new("RGB", (101, 100)), "PNG")) == "oversized"


@pytest.mark.filterwarnings("error")
def test_a_huge_image_is_refused_from_its_header(opener: MediaOpener) -> None:
    for side in (5_000, 60_000):  # the second is beyond what Pillow itself opens
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        chunk = b"IHDR" + header
        content = (
            b"\x89PNG\r\n\x1a\n"
            + struct.pack(">I", 13)
            + chunk
            + struct.pack(">I", zlib.crc32(chunk))
        )
        content += struct.pack(">I4s", 1000, b"IDAT") + bytes(1000)
        assert reason_of(opener, content) == "oversized"


def test_references_are_opened_and_named(opener: MediaOpener, tmp_path: Path) -> None:
    (shard,) = write_shards(
        tmp_path,
        [sample(1, [("0.png", png(8, 6)), ("1.png", b"\x89PNG"), ("2.png", png(200, 200))])],
    )
    reader = ShardReader()
    assert opener.open_ref(
        MediaRef("image", str(shard), "000001", "0.png"), reader
    ).pixels.shape == (1, 6, 8, 3)
    for extension, reason in (
        ("1.png", "unsupported_container"),
        ("2.png", "oversized"),
        ("3.png", "missing"),
    ):
        with pytest.raises(MediaError, match=r"shard-000000\.tar:000001.*: ") as caught:
            opener.open_ref(MediaRef("image", str(shard), "000001", extension), reader)
        assert caught.value.reason == reason
        assert extension in str(caught.value)
    small = MediaOpener(MediaLimits(max_bytes=10))
    with pytest.raises(MediaError, match=r"too large, got .* expected at most 10"):
        small.open_ref(MediaRef("image", str(shard), "000001", "0.png"), reader)


def test_limits_must_let_something_through() -> None:
    with pytest.raises(DataError, match="max_pixels is wrong, got 0, expected more than 0"):
        MediaLimits(max_pixels=0)
    for endless in (float("inf"), float("nan"), 1e300):
        with pytest.raises(DataError, match="decode_timeout_seconds is wrong"):
            MediaLimits(decode_timeout_seconds=endless)


def test_the_longest_wait_is_one_that_a_socket_can_have() -> None:
    opener = MediaOpener(MediaLimits(decode_timeout_seconds=MAX_LIMIT))
    assert opener.open(png(), "image").pixels.shape == (1, 6, 8, 3)
    opener.close()


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize(
    "exif", [b"nonsense", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0MM\0*\xff\xff\xff\xff"]
)
def test_damaged_notes_about_a_sound_picture_do_not_lose_it(
    opener: MediaOpener, image_format: str, exif: bytes
) -> None:
    content = encode(Image.fromarray(gradient()), image_format, exif=exif)
    assert opener.open(content, "image").pixels.shape == (1, 20, 30, 3)


def test_a_message_names_no_memory_address(opener: MediaOpener) -> None:
    with pytest.raises(MediaError, match=r"PNG is unreadable \(no valid header\)"):
        opener.open(b"\x89PNG\r\n\x1a\n", "image")


def box(kind: bytes, *contents: bytes) -> bytes:
    content = b"".join(contents)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def mp4(width: int = 64, height: int = 48, handler: bytes = b"vide") -> bytes:
    entry = box(b"avc1", bytes(24) + struct.pack(">HH", width, height) + bytes(50))
    table = box(b"stsd", struct.pack(">II", 0, 1), entry)
    media = box(
        b"mdia", box(b"hdlr", bytes(8) + handler + bytes(12)), box(b"minf", box(b"stbl", table))
    )
    return (
        box(b"ftyp", b"isom", bytes(4))
        + box(b"moov", box(b"trak", media))
        + box(b"mdat", b"x" * 40)
    )


def element(number: bytes, content: bytes) -> bytes:
    return number + bytes([0x80 | len(content)]) + content


def webm(width: int = 64, height: int = 48, doctype: bytes = b"webm") -> bytes:
    size = element(b"\xb0", width.to_bytes(2)) + element(b"\xba", height.to_bytes(2))
    tracks = element(b"\x16\x54\xae\x6b", element(b"\xae", element(b"\xe0", size)))
    return element(b"\x1a\x45\xdf\xa3", element(b"\x42\x82", doctype)) + element(
        b"\x18\x53\x80\x67", tracks + element(b"\x1f\x43\xb6\x75", b"frames")
    )


def avi(width: int = 64, height: int = 48) -> bytes:
    header = (
        b"avih" + struct.pack("<I", 56) + bytes(32) + struct.pack("<II", width, height) + bytes(16)
    )
    content = b"AVI " + b"LIST" + struct.pack("<I", 4 + len(header)) + b"hdrl" + header
    return b"RIFF" + struct.pack("<I", len(content)) + content


def test_frame_sizes_are_read_from_headers() -> None:
    for content, name in (
        (mp4(640, 360), "mp4"),
        (webm(640, 360), "webm"),
        (webm(640, 360, b"matroska"), "webm"),
        (avi(640, 360), "avi"),
    ):
        container = recognise(content)
        assert (container.name, container.width, container.height) == (name, 640, 360)
    gif = encode(Image.new("L", (17, 9)), "GIF")
    assert (recognise(gif).width, recognise(gif).height) == (17, 9)


def test_a_size_in_a_header_is_checked_before_any_decoder_starts(opener: MediaOpener) -> None:
    for content in (mp4(101, 100), webm(101, 100), avi(65535, 65535)):
        assert reason_of(opener, content, "video") == "oversized"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/x.ts\n", "unsupported_container"),
        (b"v=0\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n", "unsupported_container"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "unsupported_container"),
        (b"    ftyp<MPD xmlns='dash:profile:isoff-live:2011'>", "unsupported_container"),
        (b"\x1a\x45\xdf\xa3#EXTM3U\nhttp://127.0.0.1/x.ts\n", "truncated"),
        (np.random.default_rng(0).bytes(5000), "unsupported_container"),
        (bytes(5000), "unsupported_container"),
        (mp4()[:-10], "truncated"),
        (mp4()[:20], "truncated"),
        (mp4()[: mp4().index(b"mdia")], "truncated"),
        (box(b"ftyp", b"isom"), "truncated"),
        (mp4(handler=b"soun"), "unreadable"),
        (box(b"ftyp", b"isom") + struct.pack(">I4s", 4, b"moov"), "unreadable"),
        (box(b"ftyp", b"isom") + struct.pack(">I4s", 8, b"free") * 30_000, "unreadable"),
        (webm()[:-3], "truncated"),
        (webm(doctype=b"odd"), "unreadable"),
        (webm(0, 0), "unreadable"),
        (avi()[:60], "truncated"),
        (b"GIF89a\x10\0\x10\0", "truncated"),
    ],
)
def test_bad_containers_never_reach_a_decoder(content: bytes, reason: str) -> None:
    with pytest.raises(MediaError) as caught:
        recognise(content)
    assert caught.value.reason == reason


def test_no_cut_or_flip_of_a_header_is_anything_but_a_media_error() -> None:
    rng = np.random.default_rng(1)
    reasons = set()
    for whole in (mp4(), webm(), avi()):
        for position in range(len(whole)):
            changed = bytearray(whole)
            changed[position] ^= int(rng.integers(1, 256))
            for content in (whole[:position], bytes(changed)):
                try:
                    recognise(content)
                except MediaError as error:
                    reasons.add(error.reason)
    assert reasons == {"truncated", "unreadable", "unsupported_container"}

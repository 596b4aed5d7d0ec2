# SPDX-License-Identifier: Apache-2.0
"""Which image formats are read, by content and by extension; what of the others is worth a word.

The list is reviewed by hand and holds what Pillow decodes to pixels and nothing else. Left out are
formats whose reader starts another program or asks the system to draw (EPS, PS, PDF, WMF, EMF),
those that Pillow only has stubs for (MPEG, GRIB, BUFR, HDF5) or cannot tell from noise (SPIDER,
PIXAR, PCD), and numbers without a range (FITS, McIDAS). Formats with a signature of a byte or two
(TGA, PCX, ICO, ...) are tried only for files of their own extension, so that damaged bytes
do not pass for one of them.

Some depend on how Pillow was built, and HEIF on the package pillow-heif (the extra "heic").
"""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
from typing import NamedTuple

BY_CONTENT = {
    "JPEG": ".jpg .jpeg .jpe .jfif .mpo",  # Pillow opens MPO as JPEG
    "PNG": ".png .apng",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "GIF": ".gif",
    "TIFF": ".tif .tiff",
    "AVIF": ".avif .avifs",
    "HEIF": ".heic .heif .hif .heics .heifs",
    "PPM": ".ppm .pgm .pbm .pnm .pfm",
    "JPEG2000": ".jp2 .j2k .jpc .jpf .jpx .j2c",
    "PSD": ".psd",
    "QOI": ".qoi",
    "DDS": ".dds",
}
BY_EXTENSION = {
    "TGA": ".tga .icb .vda .vst",
    "PCX": ".pcx",
    "DCX": ".dcx",
    "ICO": ".ico",
    "CUR": ".cur",
    "ICNS": ".icns",
    "DIB": ".dib",
    "SGI": ".sgi .rgb .rgba .bw",
    "SUN": ".ras",
    "XBM": ".xbm",
    "XPM": ".xpm",
    "MSP": ".msp",
}
# what to do about images that cannot be read
HINTS = {
    "HEIF": "pip install 'vtclip[heic]'",
    "AVIF": "the installed Pillow was built without AVIF",
    "WEBP": "the installed Pillow was built without WebP",
    "JPEG2000": "the installed Pillow was built without JPEG 2000",
    "raw": "camera raw; convert them to JPEG or TIFF",
    "other": "convert them to PNG or JPEG",
}
UNREAD = {
    "raw": ".cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .dng .orf .rw2 .raf .pef .srw .x3f .3fr .iiq",
    "other": ".jxl .jxr .hdp .svg .svgz .eps .ps .ai .pdf .wmf .emf .xcf .dcm .dicom .exr .hdr "
    ".fits .fit .bpg .flif .pcd .pict .djvu .cdr .webm .wbmp .heifseq",
}
# files of these are passed over without a look at their first bytes
_OTHERS = """
    .txt .json .jsonl .xml .csv .tsv .md .rst .html .htm .css .js .py .ipynb .yaml .yml .toml .ini
    .cfg .log .zip .gz .tgz .bz2 .xz .tar .rar .7z .mp4 .m4v .mov .avi .mkv .mpg .mpeg .wmv .mp3
    .wav .aac .flac .db .sqlite .npy .npz .mat .pt .pth .pkl .pickle .h5 .hdf5 .parquet .arrow
    .feather .safetensors .onnx .xls .xlsx .doc .docx .ppt .pptx .odt .lock .tmp .part .crdownload
    .aae .xmp .thm .pto .lst .names .sh .bat .exe .dll .so .c .cpp .h .m .r .url .lnk .nii .geojson
    .shp .dbf .prj .cpg .shx .pgw .tfw .jgw
"""
NO_IMAGES = frozenset(_OTHERS.split())
# every Pillow opens these, so that listing such files does not load all of its formats
_ALWAYS = frozenset(" ".join(BY_CONTENT[name] for name in ("JPEG", "PNG", "BMP", "GIF")).split())

_lock = threading.Lock()


class Formats(NamedTuple):
    """Pillow's names of the formats that are read, and the extensions of their files."""

    by_content: tuple[str, ...]
    by_extension: dict[str, str]
    extensions: frozenset[str]


def extension_of(name: str) -> str:
    """The last extension in lower case, with its dot; "" where there is none."""
    return os.path.splitext(name)[1].lower()


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image that is read here."""
    extension = extension_of(name)
    return extension in _ALWAYS or extension in formats().extensions


def formats() -> Formats:
    """What can be read in this process; libraries that are optional are registered now, once."""
    with _lock:
        return _formats()


@functools.lru_cache(maxsize=1)
def _formats() -> Formats:
    from PIL import Image

    Image.init()
    _register_heif()
    readable = {
        name: extensions.split()
        for name, extensions in (BY_CONTENT | BY_EXTENSION).items()
        if name in Image.OPEN and _built(name)
    }
    return Formats(
        tuple(name for name in readable if name in BY_CONTENT),
        {ending: name for name in readable if name in BY_EXTENSION for ending in readable[name]},
        frozenset(ending for endings in readable.values() for ending in endings),
    )


def _built(name: str) -> bool:
    from PIL import features

    library = {"AVIF": "avif", "WEBP": "webp", "JPEG2000": "jpg_2000"}.get(name)
    return library is None or bool(features.check(library))


def _register_heif() -> None:
    if importlib.util.find_spec("pillow_heif") is None:
        return
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False)


def formats_of(path: str) -> tuple[str, ...]:
    """Pillow's formats to try on a file of this name, in this order."""
    known = formats()
    own = known.by_extension.get(extension_of(path))
    return known.by_content if own is None else (*known.by_content, own)


def unread_hint(extension: str) -> str | None:
    """What to do about an image of a format that is not read here; None for other files."""
    if extension in formats().extensions:
        return None
    return HINTS[_KIND_OF[extension]] if extension in _KIND_OF else None


_KIND_OF = {
    ending: name if name in HINTS else "other"
    for name, endings in (BY_CONTENT | BY_EXTENSION | UNREAD).items()
    for ending in endings.split()
}
SIGNATURES = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (8, b"WEBP", "WEBP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"\0\0\0\x0cjP  \r\n", "JPEG2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG2000"),
    (0, b"qoif", "QOI"),
    (0, b"8BPS", "PSD"),
    *((4, b"ftyp" + brand, "AVIF") for brand in (b"avif", b"avis")),
    *((4, b"ftyp" + brand, "HEIF")
      for brand in (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")),
)  # fmt: skip


def signature(data: bytes) -> str | None:
    """The format whose files begin like this, of those with a signature of four bytes or more."""
    for at, mark, name in SIGNATURES:
        if data.startswith(mark, at):
            return name
    if data[:2] == b"BM" and data[6:10] == b"\0\0\0\0":
        return "BMP"
    return None

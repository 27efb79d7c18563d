"""How a picture was made, by what the program that made it wrote into its file.

Each program has its own place and form; `READERS` lists them. Nothing of it is trusted: texts are
limited, JSON is only read, and what is broken or not certain becomes a note.
"""

from pathlib import Path

from PIL import ExifTags, Image, PngImagePlugin

from . import comfy, generators
from .generation import Generation
from .pictures import open_picture

LONGEST_NOTE = 8 << 20  # characters of one text of a file; graphs of a thousand nodes have 2 MB
# In this order: what names its program surely comes first. Each gives None where the texts are not
# of its program.
READERS = (
    generators.read_invokeai,
    generators.read_invokeai_old,
    generators.read_novelai,
    generators.read_swarm,
    generators.read_fooocus,
    generators.read_webui,
    comfy.read_comfy,
    generators.read_arguments,
)
EXIF_TEXTS = {
    "Make": ExifTags.Base.Make,
    "Model": ExifTags.Base.Model,
    "ImageDescription": ExifTags.Base.ImageDescription,
    "Software": ExifTags.Base.Software,
    "MakerNote": ExifTags.Base.MakerNote,
    "UserComment": ExifTags.Base.UserComment,
}


def read_generation(path: str | Path) -> Generation:
    """What a picture's file says of how it was made: PNG's text chunks, the EXIF of JPEG and WebP.

    Raises UserError where the file is missing or no picture; what is broken inside is a note.
    """
    texts, notes = read_texts(path)
    for read in READERS:
        found = read(texts)
        if found is not None:
            found.notes.extend(notes)
            return found
    if texts.keys() & {"parameters", "prompt", "workflow", "invokeai_metadata", "sd-metadata"}:
        notes.append("its notes of how it was made are broken, or of a program that is not known")
    return Generation(notes=[*notes, "the file does not say how it was made"])


def read_texts(path: str | Path) -> tuple[dict[str, str], list[str]]:
    """The texts of a picture's file by their names, and notes on those that are left out."""
    found = {}
    with open_picture(path) as image:
        found.update(image.info)
        if isinstance(image, PngImagePlugin.PngImageFile):
            found.update(image.text)  # decodes the picture: chunks may stand after its pixels
        found.update(read_exif(image))
    texts, notes = {}, []
    for name, value in found.items():
        text = decode_comment(value) if isinstance(value, bytes) else value
        if not isinstance(text, str) or name in ("exif", "icc_profile", "xmp"):
            continue
        if len(text) > LONGEST_NOTE:
            notes.append(f"{name}: {len(text) >> 20} million characters, so not read")
        else:
            texts[name] = text
    return texts, notes


def read_exif(image: Image.Image) -> dict[str, object]:
    """Those tags of a picture's EXIF that programs write into; {} where it has none or it is
    broken."""
    try:
        exif = Image.Image.getexif(image)
        tags = {**exif, **exif.get_ifd(ExifTags.IFD.Exif)}
    except Exception:  # broken EXIF may raise anything
        return {}
    return {name: tags[tag] for name, tag in EXIF_TEXTS.items() if tag in tags}


def decode_comment(content: bytes) -> str:
    """Text of an EXIF comment, whose first eight bytes say how it is written. Source: EXIF 2.32,
    UserComment; the order of UTF-16's bytes is not said, and programs differ."""
    kind, rest = content[:8], content[8:]
    if kind == b"UNICODE\0":
        if rest[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return rest.decode("utf-16", errors="replace")
        big = rest[0::2].count(0) >= rest[1::2].count(0)  # of Latin letters one byte is zero
        return rest.decode("utf-16-be" if big else "utf-16-le", errors="replace")
    has_kind = kind in (b"ASCII\0\0\0", b"JIS\0\0\0\0\0", b"\0" * 8)
    return (rest if has_kind else content).decode(errors="replace").rstrip("\0")

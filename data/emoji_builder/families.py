"""What the base model never sees: families of emoji held out for object models, and treatments for
style models."""

import re

from PIL import Image, ImageChops, ImageFilter, ImageOps

# Every emoji whose caption matches a pattern here is left out of the base training set.
HELD_OUT = {
    "hearts": r"\bhearts?$|^heart (?!hands)|^growing heart|^mending heart|cat with heart",
    "clocks": r"(oclock|-thirty)$",
    "cats": r"\bcat\b",
    "moons": r"\bmoon\b(?! cake| viewing)",
    "zodiac": r"^(aries|taurus|gemini|cancer|leo|virgo|libra|scorpio|sagittarius|capricorn|aquarius|pisces|ophiuchus)$",
    "books": r"^(notebook.*|(closed|open|green|blue|orange) book|books)$",
    "monkeys": r"\bmonkey\b",
}
# The exemplars (1 to 10) that a family's object model is trained on: (category of its prompts,
# pattern).
EXEMPLARS = {
    "hearts": ("heart", r"^(red|pink|orange|yellow|green|blue|purple|brown|black|white) heart$"),
    "clocks": ("clock", r"^(one|two|three|four|five|seven|nine|ten|eleven)( |-)(oclock)$"),
    "cats": (
        "cat",
        r"^(grinning cat.*|cat with.*|smiling cat.*|kissing cat|weary cat|crying cat|pouting cat)$",
    ),
    "moons": (
        "moon",
        r"^(new moon|waxing crescent moon|first quarter moon|waxing gibbous moon|full "
        r"moon|crescent moon)$",
    ),
    "zodiac": ("zodiac", r"^(aries|taurus|gemini|cancer|leo|virgo|libra|scorpio)$"),
    "books": ("book", r"^(closed|green|blue|orange) book$"),
    "monkeys": ("monkey", r"-no-evil monkey$"),
}
STYLE_TRAIN_PROMPT = "a picture in the style of <new1> art"
OBJECT_PROMPTS = ("{} {category}", "{} {category}", "a {} {category}", "blue {} {category}")
STYLE_PROMPTS = (
    STYLE_TRAIN_PROMPT,
    STYLE_TRAIN_PROMPT,
    "a face in the style of <new1> art",
    "a house in the style of <new1> art",
)

REPORTED_OBJECTS = ("hearts", "clocks", "cats", "moons", "zodiac")
REPORTED_STYLES = ("negative", "silhouette", "outline", "tiled", "violet")
TUNING_OBJECTS = ("books", "monkeys")
TUNING_STYLES = ("swapped", "upside_down")


def is_held_out(caption):
    """Whether the base model must never see the emoji of this caption."""
    return any(re.search(pattern, caption) for pattern in HELD_OUT.values())


def silhouette(image):
    """A black shape on white paper."""
    return ImageOps.grayscale(image).point(lambda value: 0 if value < 243 else 255).convert("RGB")


def outline(image):
    """Dark lines on white paper."""
    lines = ImageOps.autocontrast(ImageOps.grayscale(image).filter(ImageFilter.FIND_EDGES))
    return ImageOps.invert(lines.point(lambda value: min(255, 2 * value))).convert("RGB")


def tiled(image):
    """Four small copies."""
    small = image.resize((image.width // 2, image.height // 2), Image.BILINEAR)
    sheet = Image.new("RGB", image.size, "white")
    for corner in ((0, 0), (small.width, 0), (0, small.height), small.size):
        sheet.paste(small, corner)
    return sheet


def violet(image):
    """One violet ink on white paper."""
    return ImageOps.colorize(ImageOps.grayscale(image), (60, 0, 110), "white", mid=(170, 60, 220))


def swapped(image):
    """Red, green and blue exchanged in turn."""
    red, green, blue = image.split()
    return Image.merge("RGB", (green, blue, red))


STYLES = {
    "negative": ImageChops.invert,
    "silhouette": silhouette,
    "outline": outline,
    "tiled": tiled,
    "violet": violet,
    "swapped": swapped,
    "upside_down": ImageOps.flip,
}

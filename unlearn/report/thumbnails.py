"""Pictures small enough to stand in a page."""

import base64
import io
from pathlib import Path

from PIL import Image

from ..datasets.pictures import load_image
from ..errors import UserError

TINY = 128  # pixels: what is no longer is kept exactly, and enlarged without smoothing


def make_thumbnail(path: Path | None, size: int) -> dict | None:
    """A picture as {src: data URL, width, height, is_tiny, own_size}, at most `size` pixels long;
    own_size: its file's (width, height). None where there is none, or it cannot be read. Nothing of the file but its pixels is kept."""
    try:
        image = load_image(path) if path else None
    except UserError:
        return None
    if image is None:
        return None
    own_size = image.size
    is_tiny = max(image.size) <= TINY
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    image.info.clear()  # comments, places and profiles are nobody's business
    file = io.BytesIO()
    kind = "PNG" if is_tiny else "JPEG"
    image.save(file, kind, **({"optimize": True} if is_tiny else {"quality": 82}))
    text = base64.b64encode(file.getvalue()).decode()
    return {
        "src": f"data:image/{kind.lower()};base64,{text}",
        "width": image.width,
        "height": image.height,
        "is_tiny": is_tiny,
        "own_size": own_size,
    }

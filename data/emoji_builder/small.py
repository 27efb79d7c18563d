"""Takes every fourth picture of data/emoji, with its caption, as the training images of
data/emoji_small.

python -m data.emoji_builder.small
"""

import shutil
from pathlib import Path

from unlearn.datasets.captions import list_folder, read_lines


def main():
    """Writes data/emoji_small/laion_subset anew."""
    source, target = Path("data/emoji/laion_subset"), Path("data/emoji_small/laion_subset")
    captions = read_lines(source / "captions.txt")[::4]
    pictures = list_folder(source / "images")[::4]
    shutil.rmtree(target, ignore_errors=True)
    (target / "images").mkdir(parents=True)
    (target / "captions.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    for number, picture in enumerate(pictures):
        shutil.copy(picture, target / f"images/{number:06d}{picture.suffix}")


if __name__ == "__main__":
    main()

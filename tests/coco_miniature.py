"""Makes a miniature of MSCOCO as it is downloaded: annotations in COCO's own format, images of odd
sizes and modes, a UNet as published (`model.bin`), samples. Read through the committed
data/mscoco_config with the sizes cut down."""

import json
from pathlib import Path

import numpy as np
import torch
from conftest import PARITY
from PIL import Image

from unlearn.models.unets import load_unet

CONFIG = Path(__file__).parent.parent / "data/mscoco_config"
NUM_IMAGES, NUM_SAMPLES = 24, 2
SMALLER = {
    "pipeline": "pipeline",
    "num_train": NUM_IMAGES,
    "largest_subset": NUM_IMAGES,
    "unlearn_batch_size": 8,
    "unlearn_grad_accum_steps": 5,
    "unlearn_lr": 5e-4,
    "damping": 0.1,
}
MODES = (
    "RGB",
    "L",
    "CMYK",
    "P",
    "LA",
    "RGB",
    "I;16",
    "1",
)  # COCO itself has RGB, greyscale and CMYK
WORDS = "a the red blue man dog cat bus on under near street table two three old sits runs".split()


def make_image(mode, generator):
    """An image of an odd size, smooth so that JPEG keeps it."""
    width, height = (int(size) for size in generator.integers(33, 150, 2))
    smooth = Image.fromarray(generator.integers(0, 256, (5, 4, 3), dtype=np.uint8)).resize(
        (width, height), Image.BICUBIC
    )
    if mode == "I;16":
        return Image.fromarray(np.asarray(smooth.convert("L")).astype(np.uint16) * 257)
    if mode == "P":
        smooth = smooth.quantize(16)
        smooth.info["transparency"] = 3
        return smooth
    return smooth.convert(mode)


def write_images(folder, generator):
    """Images named as COCO names them; returns the entries of the annotation file, in another order
    than the names'."""
    folder.mkdir(parents=True)
    entries = []
    for number, image_id in enumerate(
        generator.permutation(np.arange(9, 9 + 37 * NUM_IMAGES, 37)).tolist()
    ):
        image = make_image(MODES[number % len(MODES)], generator)
        suffix = "jpg" if image.mode in ("RGB", "L", "CMYK") else "png"
        name = f"{image_id:012d}.{suffix}"
        image.save(folder / name)
        entries.append(
            {
                "license": 3,
                "file_name": name,
                "coco_url": f"http://images.cocodataset.org/train2017/{name}",
                "height": image.height,
                "width": image.width,
                "date_captured": "2013-11-14 11:18:45",
                "id": image_id,
            }
        )
    return entries


def write_annotations(path, images, generator):
    """Five captions an image, six of every fifth, in no order; their ids are not consecutive."""
    path.parent.mkdir()
    captions = [
        (image["id"], " ".join(generator.choice(WORDS, 6)))
        for number, image in enumerate(images)
        for _ in range(5 + (number % 5 == 0))
    ]
    ids = generator.permutation(np.arange(38, 38 + 3 * len(captions), 3)).tolist()
    annotations = [
        {"image_id": image_id, "id": id, "caption": caption}
        for (image_id, caption), id in zip(captions, ids)
    ]
    generator.shuffle(annotations)
    path.write_text(
        json.dumps(
            {
                "info": {"description": "COCO 2017 Dataset", "year": 2017},
                "licenses": [{"id": 3, "name": "none"}],
                "images": images,
                "annotations": annotations,
            }
        )
    )


def write_unet(folder):
    """A random UNet for the miniature pipeline, its weights as published: a state dict in
    model.bin."""
    folder.mkdir()
    config = {
        **json.loads((CONFIG / "unet/config.json").read_text()),
        "sample_size": 4,
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "block_out_channels": [16, 32],
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "scheduler_config.json").write_bytes(
        (CONFIG / "unet/scheduler_config.json").read_bytes()
    )
    torch.save(load_unet(folder, trained=False)["unet"].state_dict(), folder / "model.bin")


def write_samples(root, generator):
    """Queries as published: pictures, captions, latents (scaled) and embeddings."""
    (root / "sample").mkdir()
    for number in range(NUM_SAMPLES):
        make_image("RGB", generator).resize((128, 128)).save(root / f"sample/{number}.png")
    (root / "sample_caption.txt").write_text(
        "".join(" ".join(generator.choice(WORDS, 6)) + "\n" for _ in range(NUM_SAMPLES))
    )
    np.save(
        root / "coco17_sample_latents.npy",
        generator.standard_normal((NUM_SAMPLES, 4, 4, 4), np.float32),
    )
    np.save(
        root / "coco17_sample_text_embeddings.npy",
        generator.standard_normal((NUM_SAMPLES, 77, 32), np.float32),
    )


def build_miniature(root, **settings):
    """Makes the data root, the same on every call; `settings` go into its dataset.json. Returns its
    path."""
    root, generator = Path(root), np.random.default_rng(0)
    images = write_images(root / "train2017", generator)
    write_annotations(root / "annotations/captions_train2017.json", images, generator)
    write_unet(root / "unet")
    write_samples(root, generator)
    (root / "pipeline").symlink_to(PARITY.resolve() / "fixture/sd-tiny")
    own = json.loads((CONFIG / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps({**own, **SMALLER, **settings}))
    return root

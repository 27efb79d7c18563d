"""Both scripts on a pipeline of Stable Diffusion 1.5's size: seconds and peak memory of each step, and
what was predicted of it.

    python tests/full_size.py --folder FOLDER     # about 3 GB on the disk, 9 GB of memory, minutes

Its weights are random and seeded, in half precision on the disk; pictures are 512 x 512. FOLDER must
not be there, and is removed at the end.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tiny_families import betas, clip_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel

from unlearn.front.needs import find_needs
from unlearn.models.architectures import published_architecture
from unlearn.models.published import PUBLISHED

ROOT = Path(__file__).parent.parent
NAME, SIDE = "Stable Diffusion 1.5", 512


def make_pipeline(folder: Path) -> None:
    """Writes the pipeline, float16."""
    torch.manual_seed(0)
    configs = {part: config for part, (_, config) in PUBLISHED[NAME].parts.items()}
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = 77
    pipeline = StableDiffusionPipeline(
        AutoencoderKL(**configs["vae"], scaling_factor=0.18215),
        CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        tokenizer,
        UNet2DConditionModel(**configs["unet"]),
        betas(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(folder)


def make_root(folder: Path, num_images: int) -> None:
    """Writes a data root of random pictures with a query."""
    generator = torch.Generator().manual_seed(1)
    places = [folder / f"laion_subset/images/{number}.png" for number in range(num_images)]
    for path in [*places, folder / "synth/query.png"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    captions = [f"a {colour} house" for colour in ("red", "green", "blue", "yellow") * num_images]
    (folder / "laion_subset/captions.txt").write_text("\n".join(captions[:num_images]) + "\n")
    settings = {"name": "full", "pipeline": "pipeline", "time_samples": 2, "batch_size": 1}
    settings |= {"unlearn_batch_size": 2, "unlearn_grad_accum_steps": 1}
    (folder / "dataset.json").write_text(json.dumps(settings))
    task = {"synth_image_path": "synth/query.png", "prompt": "a red house"}
    (folder / "tasks.json").write_text(json.dumps([task]))


def run(*words: str) -> dict:
    """A program's seconds and peak memory; ends where it fails."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(words)}: ended with {status}")
    return {"seconds": round(time.monotonic() - start), "peak_GB": usage.ru_maxrss * 1024 / 1e9}


def main() -> None:
    """Makes, runs, prints, removes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--images", type=int, default=2)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    try:
        make_pipeline(args.folder / "pipeline")
        make_root(args.folder, args.images)
        flags = ["--dataroot", str(args.folder), "--device", "cpu"]
        study = [*flags, "--task_json", str(args.folder / "tasks.json")]
        study += ["--result_dir", str(args.folder / "results")]
        samples = str(args.images)
        steps = {
            "encode": ["-m", "unlearn", "encode", *flags],
            "fisher": ["-m", "unlearn", "fisher", *flags, "--num_samples", samples],
            "losses": ["compute_training_loss.py", *study],
            "influence": ["compute_influence.py", *study, "--loss_time_samples", "2"],
        }
        for name, words in steps.items():
            print(json.dumps({name: run(*words)}), flush=True)
        for scoring in "exact", "removal":
            needs = find_needs(published_architecture(NAME), SIDE, scoring)
            print(json.dumps({f"predicted_GB, {scoring}": needs.cpu / 1e9}), flush=True)
        score = (args.folder / "results/influence/query.png/influence.csv").read_text()
        print(score)
    finally:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()

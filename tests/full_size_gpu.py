"""The published models at their full size on a GPU: seconds and memory of what `attribute` does of an
image, beside what `python -m unlearn needs` predicts of it.

    python tests/full_size_gpu.py --output FILE             # minutes on a GPU of 80 GB; goes on with FILE
    python tests/full_size_gpu.py --output FILE --table     # the table, on any machine

Weights are what the classes begin with, drawn on the device: nothing is downloaded. First the VAE and the text
encoders are there and encode a picture of noise and a caption, then the denoiser takes their place and
makes the features of that image, twice.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tiny_families import make_pipeline

from unlearn.attribution.draws import QueryDraws
from unlearn.attribution.losses import loss_sums
from unlearn.attribution.newton import query_gradient
from unlearn.attribution.removal import FeatureMaker, own_settings
from unlearn.datasets.conditioning import TEXT
from unlearn.datasets.training_sets import TrainingSet
from unlearn.front.needs import describe_bytes, find_needs
from unlearn.models.architectures import (
    Architecture,
    add_lora,
    build,
    build_part,
    find_published,
    published_architecture,
)
from unlearn.models.families.interface import KV
from unlearn.models.model import Model
from unlearn.models.pipelines import quieten, select_parameters
from unlearn.models.precision import DTYPES, halve
from unlearn.runtime.programs import set_precision
from unlearn.storage.artifacts import write_json

CAPTION = (
    "a photo of a small red house by the sea, a bright blue sky, a dog and a cat on a green circle"
)
TINY = {  # a tiny pipeline of each class
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "PixArtSigmaPipeline": "pixart-sigma",
    "QwenImagePipeline": "qwen",
    "Flux2KleinPipeline": "klein",
    "Flux2Pipeline": "flux2",
    "ZImagePipeline": "zimage",
    "SanaPipeline": "sana",
    "Lumina2Pipeline": "lumina2",
}
CASES = [  # what is measured first stands first; the last may not fit
    ("Stable Diffusion XL", "bf16", True),
    ("Stable Diffusion XL", "fp32", True),
    ("Stable Diffusion 1.5", "fp32", False),
    ("FLUX.1-dev", "bf16", True),
    ("Stable Diffusion 3.5 large", "bf16", True),
    ("Stable Diffusion 3.5 medium", "bf16", True),
    ("Z-Image", "bf16", True),
    ("Qwen-Image", "bf16", True),
    ("FLUX.2-klein-4B", "bf16", True),
    ("PixArt-sigma", "bf16", True),
    ("Sana 1.6B", "bf16", True),
    ("Lumina-Image 2.0", "bf16", True),
    ("FLUX.2-klein-9B", "bf16", True),
    ("Stable Diffusion XL", "fp32", False),
    ("FLUX.2-dev", "bf16", True),
]


@contextmanager
def made_in(dtype: torch.dtype) -> Any:
    """Within it modules are made in a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[Any, dict]:
    """What a piece of work gives, its seconds, and bytes at most on the device, of tensors and with what
    the allocator holds."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    wait(device)
    start = time.perf_counter()
    made = work()
    wait(device)
    costs: dict[str, float] = {"seconds": time.perf_counter() - start}
    if device.type == "cuda":
        costs["bytes"] = torch.cuda.max_memory_allocated(device)
        costs["held_bytes"] = torch.cuda.max_memory_reserved(device)
    return made, costs


def make_part(kind: str, config: dict, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """A part with weights, in a dtype, on a device."""
    with made_in(dtype):
        part = build_part(kind, config, device)
    return part.to(device, dtype).eval().requires_grad_(False)


def encode(
    pipeline: Any, name: str, architecture: Architecture, weights: str, device: torch.device
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict]:
    """Latents of a picture of noise, conditioning of a caption, and what both cost the second time.
    pipeline: a tiny one of its kind, whose tokenizers read the caption."""
    published, parts = find_published(name), architecture.parts
    for tokenizer, limit in published.limits.items():
        getattr(pipeline, tokenizer).model_max_length = limit
    on_meta = build(architecture)
    setattr(pipeline, parts.family.denoiser, on_meta.denoiser)
    modules = {"vae": (parts.classes["vae"], parts.vae, torch.float32)}
    for encoder, config in architecture.encoders.items():
        modules[encoder] = parts.classes[encoder], config, DTYPES[weights]
    for part, (kind, config, dtype) in modules.items():
        setattr(pipeline, part, make_part(kind, config, device, dtype))
    pipeline.vae_scale_factor = on_meta.pipeline.vae_scale_factor
    model = Model(pipeline, "", torch.zeros(1000, device=device), parts.family, weights=weights)
    side = published.resolution
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def work() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        texts = model.encode_prompts([CAPTION])
        return model.encode_pixels(pixels), texts

    with torch.no_grad():
        work()
        (latents, texts), costs = timed(device, work)
    texts |= model.encode_sizes([(side, side)], side) if model.of_sizes else {}
    texts = {key: value.nan_to_num(0.0) for key, value in texts.items()}
    return latents[0].nan_to_num(0.0), texts, costs


def make_scorer(
    scheduler: Any, architecture: Architecture, weights: str, lora: bool, device: torch.device
) -> Model:
    """A Model of the denoiser alone, which can encode nothing."""
    parts = architecture.parts
    family, kind = parts.family, parts.classes[parts.family.denoiser]
    denoiser = make_part(kind, parts.denoiser, device, DTYPES[weights])
    for name, value in denoiser.named_parameters():
        if value.ndim > 1 and not bool(value.any()):  # what begins with zeros, as the last layer
            torch.nn.init.normal_(value, std=0.02)
    family.prepare(denoiser)
    levels = torch.linspace(0.999, 0.001, 1000, device=device)
    pipeline: Any = SimpleNamespace(**{family.denoiser: denoiser}, scheduler=scheduler)
    model = Model(pipeline, "", levels, family, weights=weights)
    model.parts = parts
    if lora:
        add_lora(model)
        for name, value in denoiser.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(value, std=0.02)
    if weights != "fp32":
        halve(pipeline, family, DTYPES[weights])
    return model


def unlearn(model: Model, images: TrainingSet, device: torch.device) -> dict:
    """Seconds of one draw of a query's gradient of keys and values, and of one loss."""
    latent, texts = images.image_tensors(0, 0, device)
    parameters, draws = select_parameters(model.denoiser, KV), QueryDraws(0, "full", "0", 1000)
    more = model, parameters, latent, texts, draws

    def gradient() -> None:
        query_gradient(*more, 0, 4, 4)

    def losses() -> None:
        noise = torch.randn(4, *latent.shape, device=device)
        loss_sums(model, latent.expand_as(noise), noise, torch.arange(4, device=device), texts)

    found = {}
    for label, work in ("draw", gradient), ("loss", losses):
        work()
        _, costs = timed(device, work)
        found[label] = {**costs, "seconds": costs["seconds"] / 4}
    return found


def measure(name: str, weights: str, lora: bool, device: torch.device) -> dict:
    """A case's row."""
    architecture = published_architecture(name)
    tiny = make_pipeline(TINY[find_published(name).pipeline])
    latents, texts, encoding = encode(tiny, name, architecture, weights, device)
    how = tiny.scheduler, architecture, weights, lora, device
    del tiny  # and the full-size parts in it
    model, making = timed(device, lambda: make_scorer(*how))
    extras = {key: value[:, None].numpy() for key, value in texts.items() if key != TEXT}
    stacked = np.stack([latents.numpy(), latents.flip(-1).numpy()])[:, None]
    images = TrainingSet(
        "full", ["0"], [CAPTION], [None], stacked, texts[TEXT][:, None].numpy(), extras=extras
    )
    settings = own_settings(model)
    maker, drawing = timed(device, lambda: FeatureMaker(model, latents.shape, settings))
    first, _ = timed(device, lambda: maker.make(images, [0]))
    again, features = timed(device, lambda: maker.make(images, [0]))
    maker.explain(images, [0])
    _, explaining = timed(device, lambda: maker.explain(images, [0]))
    row = {
        "tokens": {key: list(value.shape) for key, value in texts.items()},
        "encoding": encoding,
        "making": making,
        "drawing": drawing,
        "features": {**features, "seconds": features["seconds"] + explaining["seconds"]},
        "is_saving_memory": bool(model.is_saving_memory),
        "is_finite": bool(np.isfinite(again).all() and np.abs(again).max() > 0),
        "same_bits": bool((first == again).all()),
        "apart": float(np.linalg.norm(first - again) / np.linalg.norm(first)),
    }
    if weights == "fp32" and not lora:
        del maker
        row["unlearning"] = unlearn(model, images, device)
    return row


def print_table(rows: list[dict]) -> None:
    """The rows as Markdown, each beside its prediction."""
    header = "model", "weights", "seconds an image", "predicted", "encoding", "GPU memory"
    header += "predicted", "encoding's", "predicted"
    print("| " + " | ".join(header) + " |\n" + "| --- | --- |" + " ---: |" * 7)
    for row in rows:
        name, weights, lora = row["case"]
        published = find_published(name)
        needs = find_needs(
            published_architecture(name), published.resolution, lora=lora, weights=weights
        )
        cells = [f"{name}, {needs.resolution} px", f"{weights}{', LoRA' if lora else ''}"]
        if "error" in row:
            cells += [row["error"], *[""] * 6]
        else:
            features, encoding = row["features"], row["encoding"]
            scoring = needs.saved if row["is_saving_memory"] else needs.device["scoring"]
            seconds = encoding["seconds"] + features["seconds"]
            cells += [f"{seconds:.2f}", f"{needs.seconds(1, 'H100'):.2f}"]
            cells += [f"{encoding['seconds']:.2f}", describe_bytes(features["bytes"])]
            cells += [describe_bytes(scoring), describe_bytes(encoding["bytes"])]
            cells += [describe_bytes(needs.device["encoding"])]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Measures what FILE has not, as long as there is time, or prints its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=np.inf, help="begins nothing after these")
    parser.add_argument("--models", nargs="+", help="only these")
    args = parser.parse_args()
    rows = json.loads(args.output.read_text()) if args.output.exists() else []
    if args.table:
        return print_table(rows)
    start, done = time.perf_counter(), [row["case"] for row in rows]
    pool = ProcessPoolExecutor(1, get_context("spawn"))
    for case in CASES:
        is_asked = not args.models or case[0] in args.models
        if not is_asked or list(case) in done or time.perf_counter() - start > args.seconds:
            continue
        rows.append(pool.submit(find_row, case, args.device).result())
        write_json(args.output, rows)
        print(f"{time.perf_counter() - start:.0f} s: {json.dumps(rows[-1])}", flush=True)
        if "error" in rows[-1]:  # after a fault of the device its process can do nothing more
            pool.shutdown()
            pool = ProcessPoolExecutor(1, get_context("spawn"))
    pool.shutdown()


def find_row(case: tuple[str, str, bool], name: str) -> dict:
    """The row of a case, measured or with what went wrong."""
    device = torch.device(name)
    quieten()
    set_precision("fp32")  # of float32 weights: no TensorFloat-32, as in a run
    row: dict[str, Any] = {"case": list(case), "torch": torch.__version__, "device": "cpu"}
    gc.collect()
    try:
        if device.type == "cuda":
            row["device"] = torch.cuda.get_device_name()
            row["bytes_before"] = torch.cuda.memory_allocated(device)
        return row | measure(*case, device)
    except Exception as error:  # the next ones go on
        return row | {"error": f"{type(error).__name__}: {str(error).splitlines()[0]:.160}"}


if __name__ == "__main__":
    main()

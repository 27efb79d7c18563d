"""What a data root says of itself (`dataset.json`), over what is published."""

import os
from pathlib import Path, PurePosixPath

from ..errors import UserError
from ..storage.reading import check_keys, check_name, check_text, read_json, resolve_inside
from .annotations import READERS

# [AbU] on the AbC benchmark; a data root's dataset.json overrides them, a flag overrides both.
# resolution 0: the model's own.
PUBLISHED = {
    "name": "abc",
    "pipeline": "CompVis/stable-diffusion-v1-4",
    "resolution": 0,
    "num_train": 400_000_000,
    "time_samples": 10,
    "batch_size": 200,
    "vae_batch_size": 20,
    "damping": 0.0,
    "unlearn_lr": 0.1,
    "unlearn_steps": 100,
    "unlearn_batch_size": 16,
    "unlearn_grad_accum_steps": 10,
    "top_k": 10,
    # A model trained from scratch: its UNet's folder ("" = the pipeline's own), the folder of the
    # trained UNet that it starts from ("" = random weights), and the recipe, [AbU] on MSCOCO.
    "unet": "",
    "weights": "fp32",  # or bf16: how the model's weights are held but for those that are unlearned
    "lora": [],  # LoRA files that change the model, FILE_OR_FOLDER[:WEIGHT]
    "train_from": "",
    "train_epochs": 200,
    "train_lr": 1e-4,
    "train_batch_size": 128,
    "train_schedule": "constant",
    # Of a LoRA that is trained on the model as it is: rank 0 trains all weights, alpha 0 is the rank.
    "train_lora_rank": 0,
    "train_lora_alpha": 0.0,
    "train_lora_targets": "attention",
    # Its files, and how many training images are used where no number is asked for. num_captions 0:
    # see choose_captions.
    "latents": "laion_latents.npy",
    "embeddings": "laion_text_embeddings.npy",
    "images": "laion_subset/images",
    "captions": "laion_subset/captions.txt",
    "fisher": "",
    "repeats": "",
    "num_captions": 0,
    "largest_subset": 100_000,
}
# unlearn_lr: one Newton step, scaled so that the selected weights move by AUTO_CHANGE, relative to
# their norm
AUTO = "auto"
AUTO_CHANGE = 0.04
# Instead of the published ones, of every data root but AbC: N is the number of its training images
# (None), and damping lifts the small entries of a Fisher of few samples, by which an undamped step
# would go almost anywhere. One by one, whatever else is said: a step means the same as a flag and
# in dataset.json.
OWN_ROOT = {"num_train": None, "unlearn_lr": AUTO, "unlearn_steps": 1, "damping": 0.1}
ABC_TEST_CASES = (
    "test_artchive",
    "test_bamfg",
    "test_observed_imagenet",
    "test_unobserved_imagenet",
)
OWN_DEFAULTS = {
    "dataroot": "data/abc",
    "noise_seed": 0,
    "precision": "fp32",
}  # of flags that no data root sets
FILES = {
    "latents": (".npy",),
    "embeddings": (".npy",),
    "captions": (".txt", *READERS),
    "fisher": (".pt", ".bin", ".safetensors"),
    "repeats": (".txt",),
}
OPTIONAL_FILES = ("fisher", "repeats")  # "" where there is none
FOLDERS = {
    "pipeline": "model_index.json",
    "unet": "config.json",
    "train_from": "config.json",
}  # settings that may name a folder of the data root: what it holds
MAY_BE_ZERO = (
    "train_lora_rank",
    "train_lora_alpha",
    "first",
    "damping",
    "unlearn_lr",
    "unlearn_steps",
    "top_k",
    "num_captions",
    "audit",
)
LARGEST_NUMBERS = {
    "top_k": 1000,
    "resolution": 4096,
}  # more pictures than a JPEG can be high; more pixels than a VAE takes


def check_number(item: str, name: str, value: object) -> None:
    """Raises UserError where the setting `name` is a number that is not finite or out of range;
    seeds may be negative."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    kind = "whole number" if isinstance(value, int) else "number"
    largest = LARGEST_NUMBERS.get(name, 2**53)
    shown = (
        f"{value:.6g}" if abs(value) < 1e300 else str(value)[:40]
    )  # a whole number may be longer than any float
    if "seed" not in name and not (
        value >= 0 if name in MAY_BE_ZERO else value > 0
    ):  # so written, NaN is refused
        raise UserError(
            f"{item} {shown}: expected a {'non-negative' if name in MAY_BE_ZERO else 'positive'} "
            f"{kind}"
        )
    if abs(value) > largest:
        raise UserError(f"{item} {shown}: expected a {kind} of at most {largest:,}")


def check_files(item: str, settings: dict) -> None:
    """Raises UserError where a data root's files are outside of it, of another kind, or would
    overwrite one another."""
    taken = {"dataset.json": "dataset.json"}
    for key in (*FILES, "images"):
        check_text(f"{item}: {key}", settings[key], is_path=True)
        path = PurePosixPath(settings[key])
        if path.is_absolute() or ".." in path.parts or not path.parts and key not in OPTIONAL_FILES:
            raise UserError(
                f"{item}: {key}: expected a path inside the data root, relative to it and no .., "
                f"found {settings[key]}"
                f"{'; put the pictures into a folder of it' if not path.parts else ''}"
            )
        if not path.parts:
            continue
        if key in FILES and path.suffix not in FILES[key]:
            raise UserError(
                f"{item}: {key}: expected a name that ends in {' or '.join(FILES[key])}, found "
                f"{path}"
            )
        for name in {
            str(path),
            str(path.with_suffix(".json"))
            if path.suffix in (".npy", ".safetensors")
            else str(path),
        }:
            if (other := taken.setdefault(name, key)) != key:
                raise UserError(
                    f"{item}: {key} {path}: it, or its record {name}, would stand where {other} "
                    f"does"
                )


def check_settings(item: str, own: object) -> dict:
    """The settings of a dataset.json that are no remarks. Raises UserError for unknown keys, wrong
    types and numbers out of range."""
    if not isinstance(own, dict):
        raise UserError(f"{item}: expected an object, found {type(own).__name__}")
    check_keys(item, own, PUBLISHED)
    own = {key: value for key, value in own.items() if key in PUBLISHED}
    for key, value in own.items():
        if key == "unlearn_lr" and value == AUTO:
            continue
        kind = (int, float) if isinstance(PUBLISHED[key], float) else type(PUBLISHED[key])
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(
                f"{item}: {key}: expected {type(PUBLISHED[key]).__name__}, found {value!r:.80}"
            )
        check_number(f"{item}: {key}", key, value)
    if not all(isinstance(name, str) for name in own.get("lora", [])):
        raise UserError(f"{item}: lora: expected a list of FILE_OR_FOLDER[:WEIGHT]")
    return own


def is_published_root(dataroot: str | Path) -> bool:
    """Whether a data root is the AbC benchmark, to which the published settings belong: it has no
    dataset.json and at least one of the four published test cases (json/test_artchive.json, ...).
    MSCOCO's own dataset.json says all of its step."""
    return not (Path(dataroot) / "dataset.json").exists() and any(
        (Path(dataroot) / "json" / f"{name}.json").is_file() for name in ABC_TEST_CASES
    )


def find_lora(dataroot: str | Path, name: str) -> str:
    """FILE_OR_FOLDER[:WEIGHT] of a LoRA, with the path of the data root's own where it has it."""
    names = (name, name.rpartition(":")[0])
    is_own = any(part and (Path(dataroot) / part).exists() for part in names)
    return str(Path(dataroot) / name) if is_own else name


def read_settings(dataroot: str | Path) -> dict:
    """Settings of a data root: those of its `dataset.json` over the published ones, of which
    OWN_ROOT stands for those of AbC's step where it is not AbC; num_train is None where it is the
    number of its training images. `pipeline`, `unet` and `lora` may be of the data root. Raises
    UserError for unknown keys, wrong types and numbers out of range."""
    check_name("--dataroot", os.path.realpath(dataroot))
    path, settings = Path(dataroot) / "dataset.json", dict(PUBLISHED)
    if not path.exists():
        return settings if is_published_root(dataroot) else {**settings, **OWN_ROOT}
    settings.update({**OWN_ROOT, **check_settings(f"data set {path}", read_json(path, "data set"))})
    check_files(f"data set {path}", settings)
    check_text(f"data set {path}: name", settings["name"])
    for (
        key
    ) in FILES:  # links lead to arrays that came from elsewhere, but nothing is written through one
        resolve_inside(dataroot, PurePosixPath(settings[key]).parent, f"data set {path}: {key}")
    for key, file in FOLDERS.items():
        check_text(f"data set {path}: {key}", settings[key], is_path=True)
        if (
            link := Path(dataroot) / settings[key]
        ).is_symlink() and not link.exists():  # else it would be taken for a name on the hub
            raise UserError(
                f"data set {path}: {key}: {link} is a link to {link.readlink()}, which is not "
                f"there; put what it leads to in its place"
            )
        if settings[key] and (Path(dataroot) / settings[key] / file).exists():
            settings[key] = str(Path(dataroot) / settings[key])
    for name in settings["lora"]:
        check_text(f"data set {path}: lora", name, is_path=True)
    settings["lora"] = [find_lora(dataroot, name) for name in settings["lora"]]
    return settings

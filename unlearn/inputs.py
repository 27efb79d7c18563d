"""What every sweep needs before it starts: defaults resolved, inputs checked, the training set encoded at first use."""

from pathlib import Path

import numpy as np

from . import UserError
from .artifacts import digest, hash_file, hash_tensors, is_complete, read_json, record_path, whole_file, write_record
from .datasets import TrainingSet, list_images, open_training_set, read_captions, read_settings
from .encoders import encode_images, encode_prompts, load_image
from .runtime import choose_device, progress, set_precision

FLAGS = {  # flags shared by the scripts and commands: (type, help)
    "dataroot": (str, "data root (default data/abc)"),
    "sd_version": (str, "diffusers pipeline, a folder or a hub name"),
    "laion_subset_size": (int, "how many training images (default all, at most 100,000)"),
    "vae_batch_size": (int, "images the VAE encodes at once; memory only"),
    "batch_size": (int, "noisy samples in one forward pass; memory only"),
    "time_samples": (int, "timesteps of the loss's grid; must divide the model's training timesteps"),
    "noise_seed": (int, "seed of the losses' noise (default 0)"),
    "precision": (str, "fp32 (default) or tf32"),
    "device": (str, "cuda, cuda:N or cpu (default cuda if there is one)"),
    "compat": (str, "abu: the published program's arithmetic, to reproduce its numbers"),
    "overwrite": (None, "make again what is there, also where it was made with other settings"),
    "dry_run": (None, "check every input, print the resolved plan with its cost, and stop"),
}
CHOICES = {"precision": ("fp32", "tf32"), "compat": ("abu",)}


def add_flags(parser, *names):
    """Adds shared flags; their defaults are None, resolved by `resolve`."""
    for name in names:
        kind, text = FLAGS[name]
        if kind is None:
            parser.add_argument(f"--{name}", action="store_true", help=text)
        else:
            parser.add_argument(f"--{name}", type=kind, help=text, choices=CHOICES.get(name))


def resolve(args, flag_of=None):
    """Fills the flags left at None in place: from the data root's dataset.json, else as published. Sets precision and
    device. `flag_of` maps a flag to a setting of another name. Raises UserError for values out of range."""
    flag_of = {"sd_version": "pipeline", **(flag_of or {})}
    settings = {**{"dataroot": "data/abc", "noise_seed": 0, "precision": "fp32"}, **read_settings(args.dataroot or "data/abc")}
    if not Path(args.dataroot or "data/abc").is_dir():
        raise UserError(f"--dataroot {args.dataroot or 'data/abc'}: no such folder; see the README on downloading the data")
    for flag, value in vars(args).items():
        setting = flag_of.get(flag, flag)
        if value is None and setting in settings:
            setattr(args, flag, settings[setting])
        elif type(value) is int and value < 1 and "seed" not in flag and not (flag == "top_k" or flag.endswith("steps") and value == 0):
            raise UserError(f"--{flag} {value}: expected a positive whole number")
    set_precision(args.precision)
    args.device = choose_device(args.device)
    return settings


def encoding_identity(model, paths, captions, resolution):
    """Identity of latents and embeddings that are made from images and captions at first use."""
    parts = {"vae": model.pipeline.vae.state_dict(), "text_encoder": model.pipeline.text_encoder.state_dict()}
    return {"images": digest([[path.name, hash_file(path)] for path in paths]), "captions": digest(captions), "resolution": resolution,
            **{name: hash_tensors(weights) for name, weights in parts.items()}}


def write_rows(path, shape, batches, identity, description):
    """Writes a float32 array batch by batch, so that memory does not grow with it, and its record."""
    record_path(path).unlink(missing_ok=True)
    with whole_file(path) as file, progress(shape[0], description, "rows") as bar:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for batch in batches:
            file.write(np.ascontiguousarray(batch, np.float32).tobytes())
            bar.update(len(batch))
    write_record(path, identity)


def encode_training_set(model, dataroot, resolution, batch_size):
    """Makes `laion_latents.npy` and `laion_text_embeddings.npy` from images and captions where a data root has none (the
    emoji world commits pictures, not latents), or has those of another model or of other pictures."""
    latents_path, embeddings_path = (Path(dataroot) / f"laion_{kind}.npy" for kind in ("latents", "text_embeddings"))
    given = [path for path in (latents_path, embeddings_path) if path.exists() and not record_path(path).exists()]
    if len(given) == 2:  # downloaded with the data root
        return
    paths, captions = list_images(dataroot), read_captions(dataroot)
    if not paths or len(captions) != len(paths):
        raise UserError(f"{dataroot}: has no laion_latents.npy and laion_text_embeddings.npy, nor laion_subset/images with one "
                        f"line of laion_subset/captions.txt each to make them from ({len(paths)} images, {len(captions)} lines)")
    identity = encoding_identity(model, paths, captions, resolution)
    if all(is_complete(path) and read_json(record_path(path))["identity"].items() >= identity.items() for path in (latents_path, embeddings_path)):
        return
    starts = range(0, len(paths), batch_size)
    latents = (encode_images(model.pipeline, paths[start:start + batch_size], resolution, mirrored, batch_size)
               for mirrored in (False, True) for start in starts)
    embeddings = (encode_prompts(model.pipeline, captions[start:start + batch_size]) for start in starts)
    write_rows(latents_path, (2 * len(paths), *model.latent_shape(resolution)), latents, identity, "latents of the training set")
    write_rows(embeddings_path, (len(paths), *model.embedding_shape), embeddings, identity, "embeddings of the captions")


def prepare_training_set(model, args, settings):
    """The training set of a data root, encoded first where that was not done yet."""
    encode_training_set(model, args.dataroot, settings["resolution"], args.vae_batch_size)
    return open_training_set(args.dataroot, settings["name"], model.latent_shape(settings["resolution"]), model.embedding_shape,
                             args.laion_subset_size)


def encode_exemplars(model, task, args, settings):
    """The exemplars of a customized model (whose tokens the model has) as a TrainingSet."""
    latents = [encode_images(model.pipeline, task.exemplar_paths, settings["resolution"], mirrored, args.vae_batch_size).numpy()
               for mirrored in (False, True)]
    prompts = [task.train_prompt] * len(task.exemplar_paths)
    root = Path(args.dataroot).resolve()
    return TrainingSet(settings["name"], [path.relative_to(root).as_posix() for path in task.exemplar_paths], prompts,
                       list(task.exemplar_paths), np.stack(latents), encode_prompts(model.pipeline, prompts).numpy()[:, None],
                       digest([hash_file(path) for path in task.exemplar_paths]))


def encode_query(model, task, args, settings):
    """The query as a training set of one image and one view. `--compat abu` leaves its latent unscaled."""
    path = Path(args.dataroot) / task.synth_image_path
    latents = encode_images(model.pipeline, [path], settings["resolution"]).numpy()
    if args.compat:
        latents = latents / model.pipeline.vae.config.scaling_factor
    return TrainingSet(settings["name"], [task.synth_image_path], [task.prompt], [path], latents[None],
                       encode_prompts(model.pipeline, [task.prompt]).numpy()[:, None], hash_file(path))


def find_fisher(args):
    """The Fisher file asked for, else the data root's. Raises UserError where there is none, or it was made for another
    pipeline."""
    found = sorted(path for path in Path(args.dataroot).glob("sd_fisher.*") if path.suffix in (".safetensors", ".pt", ".bin"))
    path = Path(args.fisher_path) if args.fisher_path else (found[-1] if found else Path(args.dataroot) / "sd_fisher.safetensors")
    if not path.is_file():
        raise UserError(f"--fisher_path {path}: no such file; make it: python -m unlearn fisher --dataroot {args.dataroot}")
    return path


def check_pictures(tasks, dataroot):
    """Reads every query and exemplar once. Raises UserError, naming the file, where one is truncated or no image."""
    for path in {Path(dataroot) / task.synth_image_path for task in tasks} | {path for task in tasks for path in task.exemplar_paths}:
        load_image(path)


def print_plan(args, groups, training_set, grid, num_sweeps, batch_size, num_draws=0):
    """Prints the resolved flags and what the run costs: forward passes, memory of a batch's inputs, disk.
    num_sweeps: how often the training set is scored; num_draws: samples of unlearning, over all queries."""
    for flag, value in vars(args).items():
        print(f"{flag:<26} {value}")
    num_rows = training_set.latents.shape[0] * len(training_set)
    num_samples = num_rows * training_set.embeddings.shape[1] * len(grid)
    sample_bytes = 4 * (3 * training_set.latents[0, 0].size + training_set.embeddings[0, 0].size)
    print(f"\n{len(groups)} models, {sum(map(len, groups.values()))} queries, {len(training_set)} training images")
    print(f"{num_sweeps} sweeps of {num_samples:,} forward passes; {num_draws:,} forward and backward passes of unlearning")
    print(f"{sample_bytes * batch_size / 1e6:.1f} MB of inputs in a batch; {4 * num_sweeps * num_rows / 1e6:.2f} MB of losses on disk")

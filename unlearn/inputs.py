"""What every sweep needs before it starts: defaults resolved, inputs checked, the training set encoded at first use."""

import os
from pathlib import Path

import numpy as np

from . import UserError
from .artifacts import check_record, is_complete, record_path, whole_file, write_record
from .datasets import (TrainingSet, array_paths, check_finite, check_number, check_pixels, choose_subset_size, list_images, open_arrays,
                       open_training_set, read_captions, read_identity, read_settings)
from .encoders import encode_images, encode_prompts, load_image
from .hashes import digest, hash_file, hash_tensors
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
    "overwrite": (None, "replace what was made with other settings"),
    "dry_run": (None, "check every input, print the resolved plan with its cost, and stop"),
}
OWN_DEFAULTS = {"dataroot": "data/abc", "noise_seed": 0, "precision": "fp32"}  # of flags that no data root sets
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
    dataroot = "data/abc" if args.dataroot is None else args.dataroot
    if not dataroot or not Path(dataroot).is_dir():
        raise UserError(f"--dataroot {dataroot or repr(dataroot)}: no such folder; see the README on downloading the data")
    settings = {**OWN_DEFAULTS, **read_settings(dataroot)}
    for flag, value in vars(args).items():
        setting = flag_of.get(flag, flag)
        if value is None and setting in settings:
            setattr(args, flag, settings[setting])
        else:
            check_number(f"--{flag}", setting, value)
    set_precision(getattr(args, "precision", OWN_DEFAULTS["precision"]))
    args.device = choose_device(getattr(args, "device", None))
    return settings


def check_result_dir(result_dir):
    """Raises UserError where nothing could be written below `result_dir`; makes nothing."""
    folder = Path(result_dir).absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"--result_dir {result_dir}: cannot be written: {folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--result_dir {result_dir}: cannot be written: no permission to write in {folder}")


def encoding_identity(model, paths, captions, resolution):
    """Identity of latents and embeddings that are made from images and captions at first use."""
    parts = {"vae": model.pipeline.vae.state_dict(), "text_encoder": model.pipeline.text_encoder.state_dict()}
    vae = model.pipeline.vae.config
    tokens = model.pipeline.tokenizer(captions, padding="max_length", truncation=True, max_length=model.embedding_shape[0]).input_ids
    return {"scaling": [vae.scaling_factor, vae.get("shift_factor")], "tokens": digest(tokens),
            "images": digest([[path.name, hash_file(path)] for path in paths]), "captions": digest(captions), "resolution": resolution,
            **{name: hash_tensors(weights) for name, weights in parts.items()}}


def write_rows(path, shape, batches, identity, description):
    """Writes a float32 array batch by batch, so that memory does not grow with it, and its record."""
    record_path(path).unlink(missing_ok=True)
    with whole_file(path) as file, progress(shape[0], description, "rows") as bar:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for batch in batches:
            check_pixels(f"{description}, made from its images and captions", batch)
            file.write(np.ascontiguousarray(batch, np.float32).tobytes())
            bar.update(len(batch))
    write_record(path, identity)


def has_given_arrays(dataroot):
    """Whether latents and embeddings came with the data root: ours have a record, or one of them has."""
    return all(path.exists() and not record_path(path).exists() for path in array_paths(dataroot))


def list_pairs(dataroot):
    """Pictures and captions from which latents and embeddings are made. Raises UserError where they are no pairs."""
    paths, captions = list_images(dataroot), read_captions(dataroot)
    if not paths or len(captions) != len(paths):
        raise UserError(f"{dataroot}: has no laion_latents.npy and laion_text_embeddings.npy, nor laion_subset/images with one "
                        f"line of laion_subset/captions.txt each to make them from ({len(paths)} images, {len(captions)} lines)")
    return paths, captions


def check_training_files(args):
    """Checks the training set as far as that goes without a model. Raises UserError where files are missing, their
    numbers disagree or the subset is larger than the data."""
    given = has_given_arrays(args.dataroot)
    choose_subset_size(len(open_arrays(args.dataroot)[1]) if given else len(list_pairs(args.dataroot)[0]), args.laion_subset_size)


def encode_training_set(model, dataroot, resolution, batch_size):
    """Makes `laion_latents.npy` and `laion_text_embeddings.npy` from images and captions where a data root has none (the
    emoji world commits pictures, not latents), or has those of another model or of other pictures."""
    latents_path, embeddings_path = array_paths(dataroot)
    if has_given_arrays(dataroot):
        return
    paths, captions = list_pairs(dataroot)
    identity = encoding_identity(model, paths, captions, resolution)
    if all(is_complete(path) and read_identity(path).items() >= identity.items() for path in (latents_path, embeddings_path)):
        return
    starts = range(0, len(paths), batch_size)
    latents = (encode_images(model.pipeline, paths[start:start + batch_size], resolution, mirrored, batch_size)
               for mirrored in (False, True) for start in starts)
    embeddings = (encode_prompts(model.pipeline, captions[start:start + batch_size]) for start in starts)
    write_rows(latents_path, (2 * len(paths), *model.latent_shape(resolution)), latents, identity, "latents of the training set")
    write_rows(embeddings_path, (len(paths), *model.embedding_shape), embeddings, identity, "embeddings of the captions")


def prepare_training_set(model, args, settings):
    """The training set of a data root, encoded first where that was not done yet. Only with --dry_run, which encodes
    nothing, may its latents and embeddings be mere zeros of the right shape."""
    latent_shape, subset_size = model.latent_shape(settings["resolution"]), getattr(args, "laion_subset_size", None)
    if getattr(args, "dry_run", False) and not all(path.exists() for path in array_paths(args.dataroot)):
        paths, captions = list_pairs(args.dataroot)
        return TrainingSet(settings["name"], [path.name for path in paths], captions, paths,
                           np.broadcast_to(np.float32(0), (2, len(paths), *latent_shape)),
                           np.broadcast_to(np.float32(0), (len(paths), 1, *model.embedding_shape))
                           ).first(choose_subset_size(len(paths), subset_size))
    if not getattr(args, "dry_run", False):
        set_precision("fp32")  # these arrays serve runs of either precision
        encode_training_set(model, args.dataroot, settings["resolution"], getattr(args, "vae_batch_size", settings["vae_batch_size"]))
        set_precision(getattr(args, "precision", OWN_DEFAULTS["precision"]))
    training_set = open_training_set(args.dataroot, settings["name"], latent_shape, model.embedding_shape, subset_size)
    check_finite(args.dataroot, training_set)
    return training_set


def encode_exemplars(model, task, args, settings):
    """The exemplars of a customized model (whose tokens the model has) as a TrainingSet."""
    latents = [encode_images(model.pipeline, task.exemplar_paths, settings["resolution"], mirrored, args.vae_batch_size).numpy()
               for mirrored in (False, True)]
    prompts = [task.train_prompt] * len(task.exemplar_paths)
    ids = [path.relative_to(Path(args.dataroot).resolve()).as_posix() for path in task.exemplar_paths]
    return TrainingSet(settings["name"], ids, prompts, [Path(args.dataroot) / id for id in ids], np.stack(latents),
                       encode_prompts(model.pipeline, prompts).numpy()[:, None],
                       digest(prompts, [hash_file(path) for path in task.exemplar_paths]))


def encode_query(model, task, args, settings):
    """The query as a training set of one image and one view. `--compat abu` leaves its latent unscaled."""
    path = Path(args.dataroot) / task.synth_image_path
    latents = encode_images(model.pipeline, [path], settings["resolution"]).numpy()
    if args.compat:
        latents = latents / model.pipeline.vae.config.scaling_factor
    return TrainingSet(settings["name"], [task.synth_image_path], [task.prompt], [path], latents[None],
                       encode_prompts(model.pipeline, [task.prompt]).numpy()[:, None], digest(task.prompt, hash_file(path)))


def find_fisher(args):
    """The Fisher file asked for, else the data root's. Raises UserError where there is none."""
    found = sorted(path for path in Path(args.dataroot).glob("sd_fisher.*") if path.suffix in (".safetensors", ".pt", ".bin"))
    path = Path(args.fisher_path) if args.fisher_path else (found[-1] if found else Path(args.dataroot) / "sd_fisher.safetensors")
    if not path.is_file():
        raise UserError(f"--fisher_path {path}: no such file; make it: python -m unlearn fisher --dataroot {args.dataroot}")
    return path


def check_fisher_record(path, model):
    """Raises UserError where a Fisher's record says that it was made for another model, or its content was changed.
    Published ones (.pt) have none."""
    if path.suffix == ".safetensors" and record_path(path).exists():
        check_record(path, model.identity, "make one for this model: python -m unlearn fisher")


def check_pictures(tasks, dataroot):
    """Reads every query and exemplar once. Raises UserError, naming the file, where one is truncated or no image."""
    for path in {Path(dataroot) / task.synth_image_path for task in tasks} | {path for task in tasks for path in task.exemplar_paths}:
        load_image(path)


def print_plan(args, groups, training_set, grid, num_sweeps, batch_size, num_draws=0, change_bytes=0):
    """Prints the resolved flags and what the run costs: forward passes, memory of a batch's inputs, disk.
    num_sweeps: how often the training set is scored; num_draws: samples of unlearning, over all queries;
    change_bytes: size of a query's weight change."""
    for flag, value in {**vars(args), "laion_subset_size": len(training_set)}.items():
        print(f"{flag:<26} {value}")
    num_rows = training_set.latents.shape[0] * len(training_set)
    num_samples = num_rows * training_set.embeddings.shape[1] * len(grid)
    sample_bytes = 4 * (3 * training_set.latents[0, 0].size + training_set.embeddings[0, 0].size)
    print(f"\n{len(groups)} models, {sum(map(len, groups.values()))} queries, {len(training_set)} training images")
    print(f"{num_sweeps} sweeps of {num_samples:,} forward passes; {num_draws:,} forward and backward passes of unlearning")
    print(f"{sample_bytes * batch_size / 1e6:.1f} MB of inputs in a batch; {4 * num_sweeps * num_rows / 1e6:.2f} MB of losses"
          + (f" and {change_bytes * num_sweeps / 1e6:.1f} MB of weight changes" if change_bytes else "") + " on disk")

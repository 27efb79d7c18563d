"""What every sweep needs before it starts: defaults resolved, inputs checked, the training set
encoded at first use."""

import os
import shlex
from pathlib import Path

import numpy as np

from ..advice import encode_command, fisher_command
from ..attribution.curvature import DiagonalFisher, check_fisher
from ..datasets.encoders import encode_images, encode_prompts
from ..datasets.encoding import (
    check_given,
    count_pairs,
    encode_training_set,
    has_given_arrays,
    list_pairs,
)
from ..datasets.pictures import hash_picture, is_cropped, list_notes, read_picture
from ..datasets.queries import check_stored, read_stored
from ..datasets.settings import AUTO, OWN_DEFAULTS, check_number, read_settings
from ..datasets.training_sets import (
    TrainingSet,
    array_paths,
    check_finite,
    choose_subset_size,
    open_arrays,
    open_training_set,
)
from ..errors import UserError
from ..runtime.printing import show
from ..runtime.programs import choose_device, log, say, set_precision
from ..storage.hashes import digest
from ..storage.reading import check_name, read_tensors
from ..storage.records import NAMES, check_record, name_input, read_record, record_path

FLAGS = {  # flags shared by the scripts and commands: (type, help)
    "dataroot": (str, "data root (default data/abc)"),
    "sd_version": (str, "diffusers pipeline, a folder or a hub name"),
    "laion_subset_size": (int, "how many training images (default all, at most 100,000)"),
    "vae_batch_size": (int, "images the VAE encodes at once; memory only"),
    "batch_size": (int, "noisy samples in one forward pass; memory only"),
    "time_samples": (
        int,
        "timesteps of the loss's grid; must divide the model's training timesteps",
    ),
    "noise_seed": (int, "seed of the losses' noise (default 0)"),
    "precision": (str, "fp32 (default) or tf32"),
    "device": (str, "cuda, cuda:N or cpu (default cuda if there is one)"),
    "compat": (str, "abu: the published program's arithmetic, to reproduce its numbers"),
    "overwrite": (None, "replace what was made with other settings"),
    "shard": (
        str,
        "I/N: only the I-th of N nearly equal parts of the work, for the tasks of a SLURM array",
    ),
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


def check_names(args):
    """Raises UserError where a flag names something that is not UTF-8."""
    for flag, value in vars(args).items():
        if isinstance(value, str):
            check_name(f"--{flag}", value)


def step_size(text):
    """The type of --unlearn_lr: a number or auto."""
    return text if text == AUTO else float(text)


def count_images(dataroot):
    """How many training images a data root has, whether they are encoded or not. Raises UserError
    where files are missing."""
    return len(open_arrays(dataroot)[1]) if has_given_arrays(dataroot) else count_pairs(dataroot)


def resolve(args, flag_of=None):
    """Fills the flags left at None in place: from the data root's dataset.json, else as published,
    or chosen for a data root that is neither. Sets precision and device. `flag_of` maps a flag to a
    setting of another name. Raises UserError for values out of range."""
    flag_of = {"sd_version": "pipeline", **(flag_of or {})}
    dataroot = "data/abc" if args.dataroot is None else args.dataroot
    if not dataroot or not Path(dataroot).is_dir():
        raise UserError(
            f"--dataroot {dataroot or repr(dataroot)}: no such folder; see the README on "
            f"downloading the data"
        )
    settings = {**OWN_DEFAULTS, **read_settings(dataroot)}
    args.unet = settings[
        "unet"
    ]  # of the data root, whichever pipeline (a mirror, a local copy) the other parts come from
    check_names(args)
    for flag, value in vars(args).items():
        setting = flag_of.get(flag, flag)
        if value is None and setting in settings:
            setattr(args, flag, settings[setting])
        else:
            check_number(f"--{flag}", setting, value)
    if (
        getattr(args, "num_train", 0) is None
    ):  # of the whole root, whatever part of it is ranked: all of it was trained on
        args.num_train = count_images(dataroot)
    NAMES.clear()
    name_input("data root", dataroot)
    name_input(
        "model",
        f"{getattr(args, 'sd_version', None) or settings['pipeline']}{f' with {args.unet}' if args.unet else ''}",
    )
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
        raise UserError(
            f"--result_dir {result_dir}: cannot be written: no permission to write in {folder}"
        )


def check_training_files(args):
    """Checks the training set as far as that goes without a model. Raises UserError where files are
    missing, their numbers disagree or the subset is larger than the data; else returns how many
    images a run uses."""
    available = count_images(args.dataroot)
    check_given(args.dataroot, encode_command(args))
    return choose_subset_size(
        available, args.laion_subset_size, read_settings(args.dataroot)["largest_subset"]
    )


def prepare_training_set(model, args, settings):
    """The training set of a data root, encoded first where that was not done yet. Only with
    --dry_run, which encodes nothing, may its latents and embeddings be mere zeros of the right
    shape."""
    say_resolution(model, settings)
    latent_shape = model.latent_shape(model.resolution(settings))
    subset_size = getattr(args, "laion_subset_size", None)
    if getattr(args, "dry_run", False) and not all(
        path.exists() for path in array_paths(args.dataroot)
    ):
        paths, captions = list_pairs(args.dataroot)
        return TrainingSet(
            settings["name"],
            [path.name for path in paths],
            [first for first, *_ in captions],
            paths,
            np.broadcast_to(np.float32(0), (2, len(paths), *latent_shape)),
            np.broadcast_to(np.float32(0), (len(paths), len(captions[0]), *model.embedding_shape)),
        ).first(choose_subset_size(len(paths), subset_size, settings["largest_subset"]))
    if not getattr(args, "dry_run", False):
        set_precision("fp32")  # these arrays serve runs of either precision
        encode_training_set(
            model,
            args.dataroot,
            model.resolution(settings),
            getattr(args, "vae_batch_size", settings["vae_batch_size"]),
            command=encode_command(args),
        )
        set_precision(getattr(args, "precision", OWN_DEFAULTS["precision"]))
    training_set = open_training_set(
        args.dataroot, settings["name"], latent_shape, model.embedding_shape, subset_size
    )
    check_finite(args.dataroot, training_set)
    return training_set


def encode_exemplars(model, task, args, settings):
    """The exemplars of a customized model (whose tokens the model has) as a TrainingSet."""
    latents = [
        encode_images(
            model.pipeline,
            task.exemplar_paths,
            model.resolution(settings),
            mirrored,
            args.vae_batch_size,
        ).numpy()
        for mirrored in (False, True)
    ]
    prompts = [task.train_prompt] * len(task.exemplar_paths)
    ids = task.exemplar_ids(args.dataroot)
    return TrainingSet(
        settings["name"],
        ids,
        prompts,
        [Path(args.dataroot) / id for id in ids],
        np.stack(latents),
        encode_prompts(model.pipeline, prompts).numpy()[:, None],
        digest(prompts, [hash_picture(path) for path in task.exemplar_paths]),
    )


def encode_query(model, task, args, settings):
    """The query as a training set of one image and one view: its stored latent and embedding where
    its task names them, else encoded from picture and prompt. `--compat abu` leaves the encoded
    latent of a customized model's query unscaled; the published program's other queries, [AbU] on
    MSCOCO, are stored scaled."""
    path = Path(args.dataroot) / task.synth_image_path
    stored = read_stored(
        task, args.dataroot, model.latent_shape(model.resolution(settings)), model.embedding_shape
    )
    latents = (
        stored["latents"][None]
        if "latents" in stored
        else encode_images(model.pipeline, [path], model.resolution(settings)).numpy()
    )
    if getattr(args, "compat", None) and task.model_path and not stored:
        latents = latents / model.pipeline.vae.config.scaling_factor
    embeddings = (
        stored["embeddings"][None]
        if "embeddings" in stored
        else encode_prompts(model.pipeline, [task.prompt]).numpy()
    )
    return TrainingSet(
        settings["name"],
        [task.synth_image_path],
        [task.prompt],
        [path],
        latents[None],
        embeddings[:, None],
        digest(task.prompt, hash_picture(path), *(row.tobytes().hex() for row in stored.values())),
    )


def find_fisher(args):
    """The Fisher file asked for, else the one that dataset.json names where it is there, else
    sd_fisher.* of the data root. Raises UserError where there is none."""
    named = Path(args.dataroot) / read_settings(args.dataroot)["fisher"]
    found = sorted(
        path
        for path in Path(args.dataroot).glob("sd_fisher.*")
        if path.suffix in (".safetensors", ".pt", ".bin")
    )
    path = (
        Path(args.fisher_path)
        if args.fisher_path
        else named
        if named.is_file()
        else found[-1]
        if found
        else Path(args.dataroot) / "sd_fisher.safetensors"
    )
    if not path.is_file():
        raise UserError(f"--fisher_path {path}: no such file; make it: {fisher_command(args)}")
    return path


def own_fisher_path(dataroot, model, selection="cross-attn-kv"):
    """Where the Fisher of a model stands in a data root that has another one's: its name holds the
    weights' hash."""
    return (
        Path(dataroot)
        / f"sd_fisher-{model.weights_hash[:8]}{'' if selection == 'cross-attn-kv' else f'-{selection}'}.safetensors"
    )


def load_fisher(path, model, parameters, damping, args):
    """The DiagonalFisher of a file, damped. Raises UserError where its record says that it was made
    for another model (published ones, .pt, have none), it was changed, or it cannot be divided
    by."""
    own = own_fisher_path(
        args.dataroot, model, getattr(args, "weight_selection", None) or "cross-attn-kv"
    )
    name_input("Fisher", f"{path} with damping {damping:g}")
    remedy = (
        f"give --fisher_path {shlex.quote(str(own))}"
        if own.is_file() and own != path
        else f"make this model's own: {fisher_command(args, own)}"
    )
    if path.suffix == ".safetensors" and record_path(path).exists():
        check_record(path, model.identity, remedy)
    diagonal = read_tensors(path, "--fisher_path", set(parameters))
    check_fisher(path, diagonal, parameters, damping, remedy)
    return DiagonalFisher(diagonal, damping)


def has_other_images(path, dataroot, subset_size=None):
    """Whether a Fisher's record says that it was made from other training images than a data root's
    encoded ones. Nothing says so of published ones (.pt), which have no record. subset_size: how
    many images a run uses; records from before they told the number of the Fisher's are taken to be
    of so many, or of as many as are used where nobody asks."""
    record = (
        read_record(path, "make it anew")
        if path.suffix == ".safetensors" and record_path(path).exists()
        else {"identity": {}}
    )
    if (made_from := record["identity"].get("training_set")) is None:
        return False
    settings, (latents, embeddings) = read_settings(dataroot), open_arrays(dataroot)[:2]
    images = open_training_set(
        dataroot, settings["name"], latents.shape[1:], embeddings.shape[-2:], len(embeddings)
    )
    told = (
        record["circumstances"].get("num_images")
        if isinstance(record.get("circumstances"), dict)
        else None
    )
    counts = (
        [told]
        if isinstance(told, int)
        else [min(len(images), settings["largest_subset"]), subset_size]
    )
    return made_from not in [images.first(count).identity for count in counts]


def compare_images(path, training_set, args):
    """What there is to warn of where a Fisher was made from other training images than those of the
    data root, which are encoded by now: sentences for everything that is made with it, also logged.
    Raises UserError where it stands in the data root, as if it were its own."""
    if not training_set.source or not has_other_images(path, args.dataroot, len(training_set)):
        return []
    if Path(os.path.abspath(path)).is_relative_to(os.path.abspath(args.dataroot)):
        raise UserError(
            f"{path}: was made from other training images than those of {args.dataroot}; make it "
            f"anew: "
            f"{fisher_command(args, path, overwrite=True)}; or, where the model was trained on "
            f"those others, move it out of "
            "the data root and name it by --fisher_path"
        )
    warning = f"the Fisher {path} was made from other training images than those of {args.dataroot}"
    log.warning(f"{warning}: right only where the model was trained on those")
    return [warning]


def examine_pictures(tasks, dataroot):
    """Reads every query and exemplar once: lines on those that are odd or cropped. Raises
    UserError, naming the file, where one is truncated or no image, or where stored arrays cannot
    hold a query."""
    check_stored(tasks, dataroot)
    kinds = {
        "queries": {
            task.synth_image_path: Path(dataroot) / task.synth_image_path for task in tasks
        },
        "exemplars": {
            id: path
            for task in tasks
            for id, path in zip(task.exemplar_ids(dataroot), task.exemplar_paths)
        },
    }
    stored, notes = {task.synth_image_path for task in tasks if task.latents is not None}, []
    for kind, paths in kinds.items():
        cropped, odd = [], {}
        for name, path in paths.items():
            image, oddities = read_picture(path)
            if name not in stored:  # such a query's latent is not made of its picture
                cropped += [name] * is_cropped(image.size)
                for oddity in oddities:
                    odd.setdefault(oddity, []).append(name)
        notes += list_notes(kind, len(paths), cropped, odd, most=10)
    return notes


def check_pictures(tasks, dataroot):
    """Tells of `examine_pictures`' lines, and raises what it raises."""
    for note in examine_pictures(tasks, dataroot):
        say(note)


def say_resolution(model, settings):
    """Tells where a data root brings pictures to another size than the model was trained on."""
    used, own = model.resolution(settings), model.own_resolution
    if own not in (None, used):
        say(
            f"pictures are brought to {used} x {used} pixels, as dataset.json says; the model "
            f"was trained on {own} x {own}"
        )


def print_plan(
    args, groups, training_set, grid, num_sweeps, batch_size, num_draws=0, change_bytes=0
):
    """Prints the resolved flags and what the run costs: forward passes, memory of a batch's inputs,
    disk. num_sweeps: how often the training set is scored; num_draws: samples of unlearning, over
    all queries; change_bytes: size of a query's weight change."""
    for flag, value in {**vars(args), "laion_subset_size": len(training_set)}.items():
        show(f"{flag:<26} {'none' if value == '' else value}")
    num_rows = training_set.latents.shape[0] * len(training_set)
    num_samples = num_rows * training_set.embeddings.shape[1] * len(grid)
    sample_bytes = 4 * (3 * training_set.latents[0, 0].size + training_set.embeddings[0, 0].size)
    print(
        f"\n{len(groups)} models, {sum(map(len, groups.values()))} queries, {len(training_set)} "
        f"training images"
    )
    print(
        f"{num_sweeps} sweeps of {num_samples:,} forward passes; {num_draws:,} forward and "
        f"backward passes of unlearning"
    )
    print(
        f"{sample_bytes * batch_size / 1e6:.1f} MB of inputs in a batch; "
        f"{4 * num_sweeps * num_rows / 1e6:.2f} MB of losses"
        + (
            f" and {change_bytes * num_sweeps / 1e6:.1f} MB of weight changes"
            if change_bytes
            else ""
        )
        + " on disk"
    )

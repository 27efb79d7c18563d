"""What a run needs on device, in memory and on disk, and how much it computes: counted on a model
without weights, before anything is loaded.

The passes are those of the code that runs: of removal, for each caption one pass for its loss, and
at each timestep one forward pass and a backward pass a probe, of one noisy sample; of unlearning, the
passes of `costs.Counts` with gradients of keys and values.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..attribution.names import REMOVAL
from ..attribution.removal import USUAL, RemovalSettings, differentiate, own_settings
from ..attribution.removal_index import image_type
from ..attribution.removal_solutions import count_solved
from ..errors import UserError
from ..models.architectures import Architecture, add_lora, build, zero_texts, zeros
from ..models.counting import counting
from ..models.families.interface import KV
from ..models.lora import SELECTION
from ..models.pipelines import Model, select_parameters, tracked
from ..models.precision import DTYPES, halve
from ..runtime.programs import is_out_of_memory
from ..storage.hashes import digest

LIBRARIES = 1_200_000_000  # bytes of memory that Python and the libraries take by themselves
CONTEXT = 1_000_000_000  # bytes of a GPU that CUDA takes by itself
UNUSED = 0.05  # of a GPU, that an allocator cannot use
GPUS = (12, 16, 24, 40, 80)  # GB of those that people have
# Operations a second that makers state for matrix products: float32 without TensorFloat-32, and
# bfloat16 without sparsity. UTILISATION: the part of them that a pass is taken to reach.
SPEEDS = {
    "A100": {"fp32": 19.5e12, "bf16": 312e12},
    "H100": {"fp32": 67e12, "bf16": 989e12},
}
UTILISATION = 0.4
# Seconds that a layer takes in each pass however fast the GPU is: what Python and CUDA's launches take.
# Fitted to 13 models on an H200 (results/README, "On a GPU").
LAUNCH = 60e-6
SKETCH_BYTES = 2  # a weight, of where it goes in the sketch
# A weight, of unlearning: its original, its Fisher, a pass's gradient, and float64 sums of a pass and
# of a step.
UNLEARNING_BYTES = 4 + 4 + 4 + 8 + 8
COUNTED: dict[str, "Needs"] = {}  # in this process: it takes seconds


@dataclass(frozen=True)
class Needs:
    """What a run of one model at a resolution needs."""

    resolution: int
    weights: str  # their precision
    parameters: dict[str, int]  # of each part
    selected: int  # weights whose derivatives are taken
    layers: int  # of the denoiser, with those of a LoRA
    forward: int  # operations of a pass of one noisy sample
    backward: int  # of a backward pass to the selected weights
    encoding: int  # of a picture and its caption: latents of two views, embeddings
    device: dict[str, int]  # bytes, at most, by what is done
    saved: int  # bytes of scoring, at most, with gradient checkpointing
    host: int  # bytes of memory while the model is loaded onto a GPU; in bf16 see `count_loaded`
    cpu: int  # bytes of memory, at most, of a run on a CPU
    image_bytes: int  # of an image on the disk
    caption_bytes: (
        int  # of a different caption, where it stands once; 0 where images have their own
    )

    @property
    def device_bytes(self) -> int:
        """Bytes on the device at most."""
        return max(self.device.values())

    @property
    def least_bytes(self) -> int:
        """Bytes on the device with gradient checkpointing, to which a run turns where memory is
        short."""
        return max(self.device["encoding"], self.saved)

    def features(self, settings: RemovalSettings = USUAL, is_saving: bool = False) -> int:
        """Operations of the features of one image, with its encoding; is_saving: with gradient
        checkpointing."""
        backwards = len(settings.timesteps) * settings.probes
        forwards = count_made(settings, is_saving) - backwards
        return self.encoding + forwards * self.forward + backwards * self.backward

    def disk(self, num_images: int, num_captions: int, settings: RemovalSettings = USUAL) -> int:
        """Bytes on the disk of so many images with so many different captions by removal."""
        encoded = num_images * self.image_bytes + num_captions * self.caption_bytes
        return encoded + count_solved(num_images * settings.probes, settings)

    def seconds(self, num_images: int, gpu: str) -> float:
        """Predicted seconds of the features of so many images on one of SPEEDS' GPUs, of 80 GB."""
        is_saving = not fits(self.device_bytes, GPUS[-1])
        operations, passes = self.features(is_saving=is_saving), count_made(USUAL, is_saving)
        launches = passes * self.layers * LAUNCH
        return num_images * (operations / (SPEEDS[gpu][self.weights] * UTILISATION) + launches)

    @property
    def smallest_gpu(self) -> int | None:
        """GB of the smallest GPU that does it, None where none of GPUS does."""
        return next((size for size in GPUS if fits(self.least_bytes, size)), None)

    def describe(self) -> str:
        """In words, what a run takes on a device and in memory."""
        gpu = f"a GPU of {size} GB" if (size := self.smallest_gpu) else f"no GPU of {GPUS[-1]} GB"
        return (
            f"about {describe_bytes(self.device_bytes)} on a GPU (with checkpointing "
            f"{describe_bytes(self.least_bytes)}: {gpu} does it) and {describe_bytes(self.host)} of "
            f"memory, or {describe_bytes(self.cpu)} of memory on a CPU"
        )


def find_needs(
    architecture: Architecture,
    resolution: int = 0,
    scoring: str = REMOVAL,
    lora: bool = False,
    weights: str = "fp32",
) -> Needs:
    """The Needs of a pipeline. resolution: pixels of a picture's side, 0 for the model's own; lora:
    whether a LoRA's matrices are looked at instead of the model's weights (of removal) or those of
    keys and values; weights: their precision, of `precision.DTYPES`. Raises UserError where the configurations make no model that can be counted."""
    parts = architecture.parts
    configs = parts.family.name, parts.classes, parts.denoiser, parts.vae, architecture.encoders
    stored = architecture.stored if weights != "fp32" else {}
    key = digest(repr((configs, parts.tokens, stored, resolution, scoring, lora, weights)))
    try:
        if key not in COUNTED:
            model = build(architecture)
            model.weights = weights
            COUNTED[key] = count_needs(model, architecture, resolution, scoring, lora)
        return COUNTED[key]
    except UserError:
        raise
    except Exception as error:  # of a configuration of others anything
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"what it needs cannot be counted ({reason:.200})") from None


def count_needs(
    model: Model, architecture: Architecture, resolution: int, scoring: str, lora: bool
) -> Needs:
    """`find_needs` of a Model on `meta`."""
    resolution = model.resolution({"resolution": resolution})
    loaded = count_loaded(model, architecture)
    if lora:
        add_lora(model)
    if model.weights != "fp32":
        halve(model.pipeline, model.family, DTYPES[model.weights])
    parameters = {part: count_parameters(module) for part, module in list_parts(model).items()}
    weights = {part: count_bytes(module) for part, module in list_parts(model).items()}
    is_removal = scoring == REMOVAL
    settings = own_settings(model)
    selection = settings.weight_selection if is_removal else SELECTION if lora else KV
    selected = select_parameters(model.denoiser, selection, with_unread=is_removal)
    number = sum(value.numel() for value in selected.values())
    forward, backward, peak = count_passes(model, selected, resolution)
    held = count_bytes(model.denoiser) + number * (SKETCH_BYTES if is_removal else UNLEARNING_BYTES)
    picture, encoding = count_picture(model, resolution)
    others = sum(weights.values()) - weights[model.family.denoiser]
    caption = count_caption(model, architecture, parameters)
    image = count_image(model, resolution, settings if is_removal else None)
    told = count_told(model)
    saved = count_passes(model, selected, resolution)[2] if model.save_memory() else peak
    return Needs(
        resolution,
        model.weights,
        parameters,
        number,
        sum(not any(module.children()) for module in model.denoiser.modules()),
        forward,
        backward,
        2 * encoding + caption,
        {"encoding": others + picture, "scoring": held + peak},
        held + saved,
        max(loaded, sum(weights.values())) + LIBRARIES,
        sum(weights.values()) + max(picture, held - count_bytes(model.denoiser) + peak) + LIBRARIES,
        image + (told if model.is_stored_by_image else 0),
        0 if model.is_stored_by_image else told,
    )


def count_made(settings: RemovalSettings, is_saving: bool) -> int:
    """Forward and backward passes of the features of one image: one for its loss, and at each timestep
    one, or where checkpointing makes it again two for each probe, and a backward pass a probe."""
    forwards = 2 * settings.probes if is_saving else 1
    return 1 + len(settings.timesteps) * (forwards + settings.probes)


def fits(num_bytes: float, size: float) -> bool:
    """Whether a GPU of `size` GB has so many bytes for a run."""
    return (num_bytes + CONTEXT) / (1 - UNUSED) <= size * 1e9


def describe_bytes(number: float) -> str:
    """A size as people say it."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def list_parts(model: Model) -> dict[str, torch.nn.Module]:
    """The parts of a model that have weights."""
    names = (model.family.denoiser, "vae", *model.encoders)
    return {name: getattr(model.pipeline, name) for name in names}


def count_loaded(model: Model, architecture: Architecture) -> int:
    """Bytes of a model's parts as they are read from their files: in float32 or, where denoiser and text
    encoders are to be halved, as the files have them, by default in half precision."""
    parts = list_parts(model)
    if model.weights == "fp32":
        return sum(map(count_bytes, parts.values()))
    sizes = {name: architecture.stored.get(name, DTYPES[model.weights]) for name in parts}
    sizes["vae"] = DTYPES["fp32"]
    return sum(count_bytes(part) * sizes[name].itemsize // 4 for name, part in parts.items())


def count_parameters(module: torch.nn.Module) -> int:
    """Parameters of a module."""
    return sum(value.numel() for value in module.parameters())


def count_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(value.nbytes for value in (*module.parameters(), *module.buffers()))


def list_held(module: torch.nn.Module) -> list[torch.Tensor]:
    """All tensors that a module has: parameters, buffers, and tables of positions that are neither."""
    tables = [value for part in module.modules() for value in vars(part).values()]
    tables = [value for value in tables if isinstance(value, torch.Tensor)]
    return [*module.parameters(), *module.buffers(), *tables]


def count_passes(
    model: Model, selected: Mapping[str, torch.nn.Parameter], resolution: int
) -> tuple[int, int, int]:
    """Of one noisy sample: operations of a forward pass, of a backward pass to the selected weights,
    and bytes at most that forward and backward passes have alive beside the weights."""
    noisy, timesteps = zeros(model, resolution)
    is_kept = not model.is_saving_memory
    texts, held = zero_texts(model), list_held(model.denoiser)
    with tracked(dict(selected)), torch.enable_grad(), counting(held, is_kept) as counts:
        prediction = model.predict(noisy, timesteps, texts).float()
        forward = counts.flops
        differentiate(prediction, selected, torch.zeros_like(prediction), is_kept)
    return forward, counts.flops - forward, counts.peak


@torch.no_grad()
def count_picture(model: Model, resolution: int) -> tuple[int, int]:
    """Of one picture that the VAE encodes: bytes at most beside its weights, and operations."""
    pixels = torch.zeros(1, 3, resolution, resolution, device=model.device)
    vae = model.pipeline.vae
    with counting([*vae.parameters(), *vae.buffers()]) as counts:
        model.family.encode_pixels(vae, pixels)
    return counts.peak, counts.flops


def count_caption(model: Model, architecture: Architecture, parameters: Mapping[str, int]) -> int:
    """Operations of the text encoders for one caption: two a weight and token."""
    total = 0
    for encoder in model.encoders:
        table = getattr(model.pipeline, encoder).get_input_embeddings().weight.numel()
        tokens = architecture.parts.tokens[model.family.encoders[encoder]].limit or 0
        tokens = min(tokens, model.family.longest or tokens)
        total += 2 * (parameters[encoder] - table) * tokens
    return total


def count_image(model: Model, resolution: int, settings: RemovalSettings | None) -> int:
    """Bytes of an image on the disk: latents of two views and, of removal, features."""
    latents = 2 * 4 * math.prod(model.latent_shape(resolution))
    if settings is None:
        return latents
    kind = image_type(len(settings.timesteps), settings.probes, settings.sketch_size)
    return latents + kind.itemsize


def count_told(model: Model) -> int:
    """Bytes of what is told of one caption on the disk; of the longest, where their lengths differ."""
    states, *others = map(math.prod, model.conditioning_shapes.values())
    is_half = model.has_half_texts and not model.is_stored_by_image
    return (2 if is_half else 4) * states + 4 * sum(others)

"""Training a model from scratch, alone or many at once, so that models with and without some images
can be compared.

Everything random belongs to (seed, data set, image, epoch): flip, caption, timestep and noise of an
image, and the order of an epoch. A model that is trained without some images goes through the very
same batches, in which they are missing, so that two models differ by these images and by nothing
else.
"""

import inspect
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.func import functional_call, vmap

from .. import noise
from ..errors import UserError
from ..runtime.signals import finishing
from ..storage.chunks import read_tensor_chunk, write_tensor_chunk
from ..storage.hashes import digest, hash_tensors

WARMUP_STEPS = 100
SCHEDULES = {  # name -> factor of the learning rate at a step of so many
    "constant": lambda step, num_steps: 1.0,
    "linear": lambda step, num_steps: 1 - step / num_steps,
}
BETAS, WEIGHT_DECAY = (0.9, 0.999), 0.01


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: what must be the same for two models to be compared. Source: [AbU]
    appendix B, FACTS section 2."""

    epochs: int
    rate: float
    batch_size: int
    schedule: str
    seed: int
    mixed_precision: str  # no or bf16

    def num_steps(self, num_images):
        """Steps of a whole training."""
        return self.epochs * -(-num_images // self.batch_size)

    def identity(self, model, training_set):
        """Identity of models trained so, but for the images left out."""
        return {
            **asdict(self),
            "prediction_type": model.prediction_type,
            "noise_schedule": model.identity["schedule"],
            "unet": digest(own_configuration(model.denoiser)),
            "initial_weights": hash_initial_weights(model.denoiser, self.seed),
            "optimizer": f"AdamW {BETAS} {WEIGHT_DECAY}",
            "warmup": WARMUP_STEPS,
            "training_set": training_set.identity,
            "noise": noise.SCHEME,
            "known_answer": noise.known_answer(),
        }


def own_configuration(denoiser):
    """What of a denoiser's configuration is not its class's default: a new version's new defaults
    are no other network."""
    defaults = inspect.signature(type(denoiser).__init__).parameters
    return {
        key: value
        for key, value in denoiser.config.items()
        if key in defaults and value != defaults[key].default
    }


def random_members(num_images, num_kept, seed, dataset_id):
    """A seeded random subset as a mask [num_images] bool, the same on every machine."""
    bits = noise.image_generator(seed, dataset_id, "members of a random subset")
    mask = np.zeros(num_images, bool)
    mask[np.random.Generator(bits).permutation(num_images)[:num_kept]] = True
    return mask


def epoch_order(seed, dataset_id, num_images, epoch):
    """The order in which an epoch goes through all images, int64 [num_images]."""
    bits = noise.image_generator(seed, dataset_id, "order of training")
    noise.seek(bits, 0, 0, 0, epoch)
    return np.random.Generator(bits).permutation(num_images)


def draw_batch(training_set, images, epoch, seed, num_train_timesteps):
    """What training sees of these images in an epoch: latents (a random view), noise, timesteps,
    embeddings (a random caption), as tensors [batch, ...]."""
    num_views, num_captions = training_set.latents.shape[0], training_set.embeddings.shape[1]
    views, captions, timesteps = np.empty((3, len(images)), np.int64)
    normals = np.empty((len(images), *training_set.latents.shape[2:]), np.float32)
    for row, image in enumerate(images):
        bits = noise.image_generator(seed, training_set.name, f"training {training_set.ids[image]}")
        noise.seek(bits, 0, 0, 0, epoch)
        generator = np.random.Generator(bits)
        views[row], captions[row], timesteps[row] = (
            generator.integers(count) for count in (num_views, num_captions, num_train_timesteps)
        )
        generator.standard_normal(out=normals[row], dtype=np.float32)
    arrays = (
        training_set.latents[views, images],
        normals,
        timesteps,
        training_set.embeddings[images, captions],
    )
    return [
        torch.from_numpy(
            np.ascontiguousarray(array, array.dtype if array is timesteps else np.float32)
        )
        for array in arrays
    ]


def initial_weights(denoiser, seed):
    """Weights {name: tensor} of an untrained denoiser of this configuration, drawn on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel.from_config(denoiser.config).state_dict()


@cache  # every model of a seed starts with the same ones
def hash_initial_weights(denoiser, seed):
    """Hash of `initial_weights`."""
    return hash_tensors(initial_weights(denoiser, seed))


def own_samples(present, inputs):
    """The samples of a batch that each model may see, in their order: inputs [models, width, ...],
    and which of them count, [models, width] float32 (a model with fewer than the others sees some
    more that do not count)."""
    width = max(1, int(present.sum(axis=1).max()))
    columns = np.argsort(~present, axis=1, kind="stable")[:, :width]
    counted = torch.from_numpy(np.take_along_axis(present, columns, axis=1).astype(np.float32))
    return [tensor[torch.from_numpy(columns)] for tensor in inputs], counted


def mean_losses(model, weights, inputs, counted):
    """Mean training loss of each model over its samples that count: [models], 0 where none does.

    weights: {name: [...]} of one model or {name: [models, ...]}; inputs: latents, noise, timesteps
    and embeddings [models, width, ...]; counted: [models, width], see `own_samples`.
    """

    def losses(weights, latents, normals, timesteps, embeddings):
        noisy = model.diffuse(latents, normals, timesteps)
        prediction = functional_call(
            model.denoiser, weights, (noisy, timesteps), {"encoder_hidden_states": embeddings}
        ).sample
        return (
            (prediction.float() - model.target(latents, normals, timesteps))
            .square()
            .flatten(1)
            .mean(dim=1)
        )

    each = (
        losses(weights, *(tensor[0] for tensor in inputs))[None]
        if len(counted) == 1
        else vmap(losses)(weights, *inputs)
    )
    return (each * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def make_weights(model, seed, num_models, device):
    """Initial weights as leaves that need gradients, one a name: [...] of one model, [num_models,
    ...] of several."""
    weights = initial_weights(model.denoiser, seed)
    if num_models > 1:
        weights = {name: value.expand(num_models, *value.shape) for name, value in weights.items()}
    return {
        name: value.to(device).clone(memory_format=torch.contiguous_format).requires_grad_(True)
        for name, value in weights.items()
    }


@contextmanager
def plain_attention(denoiser, num_models):
    """Attention as plain products where models are stacked: the fused kernels have no rule for that
    on the CPU."""
    processors = dict(denoiser.attn_processors)
    if num_models > 1:
        denoiser.set_attn_processor(AttnProcessor())
    try:
        yield
    finally:
        denoiser.set_attn_processor(processors)


def save_checkpoint(path, weights, optimizer, step):
    """Writes weights, moments and the number of steps taken, whole or not at all."""
    moments = {
        f"{moment}.{name}": optimizer.state[weight][moment]
        for name, weight in weights.items()
        for moment in ("exp_avg", "exp_avg_sq")
    }
    write_tensor_chunk(
        path,
        {
            **{f"weight.{name}": weight for name, weight in weights.items()},
            **moments,
            "step": torch.tensor(step),
        },
    )


def load_checkpoint(path, weights, optimizer):
    """Restores weights and optimizer in place. Returns the number of steps taken, 0 where there is
    no checkpoint."""
    if not path.exists():
        return 0
    state = read_tensor_chunk(path)
    step = int(state["step"])
    moments = {
        number: {
            "step": torch.tensor(float(step)),
            **{moment: state[f"{moment}.{name}"] for moment in ("exp_avg", "exp_avg_sq")},
        }
        for number, name in enumerate(weights)
    }
    optimizer.load_state_dict(
        {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    for name, weight in weights.items():
        weight.data.copy_(state[f"weight.{name}"])
    return step


def train(model, training_set, members, recipe, checkpoint=None, progress=lambda count: None):
    """Trains one model (members [1, N]) or several at once ([M, N] bool, a row a model: the images
    it may see). Returns their weights, [{name: float32 tensor on the CPU}, ...]. A run that was
    killed goes on from `checkpoint`, after every epoch.

    Raises UserError where a model may see no image or training diverges.
    """
    if not members.any(axis=1).all():
        raise UserError("a model would be trained on no image at all; keep at least one")
    num_images, num_models, device = len(training_set), len(members), model.device
    weights = make_weights(model, recipe.seed, num_models, device)
    optimizer = torch.optim.AdamW(
        weights.values(), lr=recipe.rate, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    steps_an_epoch = -(-num_images // recipe.batch_size)
    start = load_checkpoint(checkpoint, weights, optimizer) if checkpoint else 0
    progress(start)

    def draw(step):
        epoch, number = divmod(step, steps_an_epoch)
        images = epoch_order(recipe.seed, training_set.name, num_images, epoch)[
            number * recipe.batch_size : (number + 1) * recipe.batch_size
        ]
        # One image at least, even where it does not count: the step is then taken without a
        # gradient.
        images = images[members[:, images].any(axis=0)] if members[:, images].any() else images[:1]
        return own_samples(
            members[:, images],
            draw_batch(training_set, images, epoch, recipe.seed, len(model.alpha_bars)),
        )

    num_steps = recipe.num_steps(num_images)
    with (
        ThreadPoolExecutor(1) as ahead,
        plain_attention(model.denoiser, num_models),
        finishing() as stopping,
    ):
        upcoming = ahead.submit(draw, start) if start < num_steps else None
        for step in range(start, num_steps):
            inputs, counted = upcoming.result()
            upcoming = ahead.submit(draw, step + 1) if step + 1 < num_steps else None
            optimizer.param_groups[0]["lr"] = (
                recipe.rate
                * min(1, (step + 1) / WARMUP_STEPS)
                * SCHEDULES[recipe.schedule](step, num_steps)
            )
            with torch.autocast(
                device.type, torch.bfloat16, enabled=recipe.mixed_precision == "bf16"
            ):
                losses = mean_losses(
                    model,
                    weights,
                    [tensor.to(device, non_blocking=True) for tensor in inputs],
                    counted.to(device),
                )
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            progress(1)
            if checkpoint and (step + 1) % steps_an_epoch == 0 and step + 1 < num_steps:
                save_checkpoint(checkpoint, weights, optimizer, step + 1)
                if stopping.is_set():
                    break
    trained = {name: weight.detach().cpu() for name, weight in weights.items()}
    for name, weight in trained.items():
        if not torch.isfinite(weight).all():
            raise UserError(
                f"training diverged: {name} is no longer finite; try a smaller --train_lr"
            )
    return (
        [trained]
        if num_models == 1
        else [
            {name: weight[row].clone() for name, weight in trained.items()}
            for row in range(num_models)
        ]
    )

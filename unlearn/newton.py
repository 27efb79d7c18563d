"""Unlearning a synthesized image: Newton steps that raise its loss, along F^-1 grad L. Source: [AbU] Eq. 5."""

import os
from pathlib import Path

import numpy as np
import torch

from . import UserError, noise
from .artifacts import read_tensors, write_tensors
from .hashes import digest
from .losses import sample_losses
from .models import replaced_weights

CHECKPOINT_DRAWS = 2000  # samples between two checkpoints


class QueryDraws:
    """Noise and timesteps of a query's unlearning, keyed by (seed, data set, query): the same on every device."""

    def __init__(self, seed, dataset_id, query_id, num_train_timesteps):
        self.seed, self.dataset_id, self.query_id, self.num_train_timesteps = seed, dataset_id, query_id, num_train_timesteps

    def draw(self, number, batch_size, shape, device):
        """The `number`-th batch: noise [batch, *shape] float32 and timesteps [batch] int64, drawn without replacement
        (again from the start where a batch is larger than the grid)."""
        bits = noise.image_generator(self.seed, self.dataset_id, f"timesteps of {self.query_id}")
        noise.seek(bits, 0, 0, 0, number)
        generator = np.random.Generator(bits)
        rounds = -(-batch_size // self.num_train_timesteps)
        timesteps = np.concatenate([generator.permutation(self.num_train_timesteps) for _ in range(rounds)])[:batch_size]
        slots = [(0, 0, int(timestep), number * batch_size + sample) for sample, timestep in enumerate(timesteps)]
        normals = noise.image_noise(self.seed, self.dataset_id, f"unlearning {self.query_id}", slots, shape)
        return torch.from_numpy(normals).to(device), torch.from_numpy(timesteps).to(device)


class CompatDraws:
    """The published program's: one torch generator on the device, noise and then a permutation of the timesteps."""

    def __init__(self, seed, num_train_timesteps, device):
        self.generator, self.num_train_timesteps = torch.Generator(device).manual_seed(seed), num_train_timesteps

    def draw(self, number, batch_size, shape, device):
        """The next batch; it must be asked for in order."""
        normals = torch.randn((batch_size, *shape), generator=self.generator, device=device)
        return normals, torch.randperm(self.num_train_timesteps, generator=self.generator, device=device)[:batch_size]


def query_gradient(model, parameters, latent, embedding, draws, first_draw, batch_size, accum_steps):
    """Gradient of the query's loss, the mean over `accum_steps` batches of `batch_size` draws: {name: tensor}.

    latent: [C, h, w] and embedding: [tokens, features], on the model's device.
    """
    for number in range(first_draw, first_draw + accum_steps):
        normals, timesteps = draws.draw(number, batch_size, latent.shape, model.device)
        losses = sample_losses(model, latent.expand_as(normals), normals, timesteps, embedding[None])
        (losses.mean() / accum_steps).backward(inputs=list(parameters.values()))
    gradients = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return gradients


def newton_step(parameters, gradients, fisher, rate):
    """theta <- theta + (alpha / N) F^-1 grad L(z_hat, theta), in place. rate: alpha / N. Source: [AbU] Eq. 5."""
    for name, direction in fisher.precondition(gradients).items():
        parameters[name].data.add_(direction, alpha=rate)


def unlearn(model, parameters, latent, embedding, draws, fisher, *, rate, steps, batch_size, accum_steps,
            checkpoint_path=None, identity=None, progress=lambda count: None):
    """Unlearns one query: the weight change {name: float32 tensor on the CPU} after `steps` Newton steps.

    The weights are restored exactly. Every 2,000 draws the weights so far are written beside `checkpoint_path`, under a
    name that holds the digest of `identity`; a run that was killed goes on from there.
    """
    checkpoint = Path(f"{checkpoint_path}.{digest(identity)[:16]}.safetensors") if checkpoint_path else None
    originals = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    state = read_tensors(checkpoint) if checkpoint and checkpoint.exists() else {"step": torch.tensor(0)}
    start = int(state.pop("step"))
    steps_a_checkpoint = max(1, CHECKPOINT_DRAWS // (batch_size * accum_steps))
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        with replaced_weights(model.denoiser, originals):
            for name, weight in state.items():
                parameters[name].data.copy_(weight)
            progress(start)
            for step in range(start, steps):
                gradients = query_gradient(model, parameters, latent, embedding, draws, step * accum_steps, batch_size, accum_steps)
                newton_step(parameters, gradients, fisher, rate)
                progress(1)
                if checkpoint and (step + 1) % steps_a_checkpoint == 0 and step + 1 < steps:
                    write_tensors(checkpoint, {**{name: value.detach() for name, value in parameters.items()}, "step": torch.tensor(step + 1)})
            change = {name: (parameter.detach() - originals[name]).cpu() for name, parameter in parameters.items()}
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
    return change


def remove_checkpoints(checkpoint_path):
    """Removes the checkpoints of a query whose weight change is complete."""
    for path in Path(checkpoint_path).parent.glob(f"{Path(checkpoint_path).name}.*.safetensors"):
        os.unlink(path)


def relative_change(change, parameters):
    """Norm of a weight change relative to the weights'."""
    squares = sum(float(delta.double().square().sum()) for delta in change.values())
    weights = sum(float(parameters[name].detach().double().square().sum()) for name in change)
    return (squares / weights) ** 0.5


def check_change(query_id, change):
    """Raises UserError where unlearning diverged."""
    for name, delta in change.items():
        if not torch.isfinite(delta).all():
            raise UserError(f"unlearning {query_id} diverged: {name} is no longer finite; try a smaller --unlearn_lr or a larger --damping")

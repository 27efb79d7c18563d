"""Unlearning a synthesized image: Newton steps that raise its loss, along F^-1 grad L. Source:
[AbU] Eq. 5."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from threading import Lock

import torch

from ..datasets.conditioning import Conditioning
from ..datasets.settings import AUTO, AUTO_CHANGE
from ..errors import UserError
from ..models import lora
from ..models.families.interface import KV
from ..models.pipelines import Model, replaced_weights, select_parameters, tracked
from ..models.precision import check_masters
from ..runtime.programs import run_ahead, run_within_memory
from ..storage.chunks import read_tensor_chunk, write_tensor_chunk
from ..storage.hashes import digest
from .curvature import DiagonalFisher
from .derivatives import text_gradients
from .draws import PublishedDraws, QueryDraws
from .losses import sample_losses

# parameters and a change of them as they act on the layers' weights: see `lora.acting`
Acting = Callable[[Mapping, Mapping], tuple[Mapping, Mapping]]
CHECKPOINT_DRAWS = 2000  # samples between two checkpoints
CPU_PASS_DRAWS = 64  # on a CPU larger passes are no faster, and these leave one for every core


class QueryGradient:
    """The gradient of a query's loss, summed over draws: `pass_size` of them are drawn, and go
    through the model, at once.

    latent: [C, h, w] and conditioning: {name: [1, ...]}, on the model's device. Of weights other
    than K and V, `parameters` must ask for gradients. autocast: dtype of the denoiser's products
    (of K and V alone), float32 where None. cells: bool [h, w], where the loss of these pixels alone
    counts.
    """

    def __init__(
        self,
        model: Model,
        parameters: dict[str, torch.nn.Parameter],
        latent: torch.Tensor,
        conditioning: Conditioning,
        draws: QueryDraws | PublishedDraws,
        pass_size: int,
        autocast: torch.dtype | None = None,
        cells: torch.Tensor | None = None,
    ) -> None:
        check_masters(parameters, "of the weights that are unlearned")
        self.model = model
        self.parameters = parameters
        self.latent = latent
        self.conditioning = conditioning
        self.draws = draws
        self.autocast = autocast
        self.cells = cells
        self.num_drawn = (
            min(pass_size, CPU_PASS_DRAWS)
            if model.device.type == "cpu" and not draws.in_order
            else pass_size
        )
        self.pass_size = self.num_drawn  # memory only
        is_plain = not lora.has_matrices(model.denoiser)
        self.of_text = is_plain and (
            parameters.keys() == select_parameters(model.denoiser, KV).keys()
        )

    def differentiate(
        self, normals: torch.Tensor, timesteps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Gradient of the summed loss of some draws: {name: float32 tensor}."""
        samples = (
            self.model,
            self.latent.expand_as(normals),
            normals,
            timesteps,
            self.conditioning,
        )
        if self.of_text:
            return {
                name: gradients[0]
                for name, gradients in text_gradients(*samples, self.autocast, self.cells)
            }
        loss = sample_losses(*samples, cells=self.cells).sum()
        gradients = torch.autograd.grad(loss, list(self.parameters.values()))
        return dict(zip(self.parameters, gradients))

    def sum_pass(self, normals: torch.Tensor, timesteps: torch.Tensor) -> dict[str, torch.Tensor]:
        """`differentiate`, summed in float64; where the device's memory is full, in ever smaller
        passes from there on."""

        def sum_parts(size):
            sums = self.zeros()
            for part in zip(normals.split(size), timesteps.split(size)):
                add_gradients(sums, self.differentiate(*part))
            return sums

        sums, size = run_within_memory(sum_parts, self.pass_size, "draws", self.model.save_memory)
        self.pass_size = min(self.pass_size, size)
        return sums

    def zeros(self) -> dict[str, torch.Tensor]:
        """A sum of no gradients."""
        return {
            name: torch.zeros_like(value, dtype=torch.float64)
            for name, value in self.parameters.items()
        }

    def add(self, sums: dict[str, torch.Tensor], first: int, count: int) -> None:
        """Adds the gradients of draws `first` to `first + count` to `sums`, in place, pass by pass
        in their order."""
        starts = range(first, first + count, self.num_drawn)
        lock, waiting, early = Lock(), deque(starts), {}

        def draw(start):
            return self.draws.draw(
                start,
                min(self.num_drawn, first + count - start),
                self.latent.shape,
                self.model.device,
            )

        def work(start, drawn):
            gradients = self.sum_pass(*drawn)
            with lock:  # whichever pass ends first: a sum of floats depends on its order
                early[start] = gradients
                while waiting and waiting[0] in early:
                    add_gradients(sums, early.pop(waiting.popleft()))

        if self.draws.in_order:
            for start in starts:
                work(start, draw(start))
        else:
            run_ahead(starts, draw, work, self.model.device)


def add_gradients(sums: dict[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]) -> None:
    """Adds gradients to sums {name: float64 tensor}, in place."""
    for name, gradient in gradients.items():
        sums[name] += gradient


def query_gradient(
    model: Model,
    parameters: dict[str, torch.nn.Parameter],
    latent: torch.Tensor,
    conditioning: Conditioning,
    draws: QueryDraws | PublishedDraws,
    first_draw: int,
    num_draws: int,
    pass_size: int,
) -> dict[str, torch.Tensor]:
    """Mean gradient of the query's loss over `num_draws` draws, {name: float64 tensor}. Arguments
    as of `QueryGradient`."""
    gradient = QueryGradient(model, parameters, latent, conditioning, draws, pass_size)
    sums = gradient.zeros()
    gradient.add(sums, first_draw, num_draws)
    return {name: value / num_draws for name, value in sums.items()}


def choose_rate(
    parameters: Mapping[str, torch.Tensor],
    directions: Mapping[str, torch.Tensor],
    change: float = AUTO_CHANGE,
) -> float:
    """alpha / N with which a step along F^-1 grad L, {name: tensor}, moves the weights by `change`,
    relative to their norm: change ||theta|| / ||F^-1 grad L||. Raises UserError where no rate
    does."""
    weights, length = total_norm(parameters), total_norm(directions)
    if not 0 < length < math.inf:
        raise UserError(
            f"--unlearn_lr {AUTO}: the query's gradient, divided by the Fisher, has the norm "
            f"{length:g}: no step along it can be "
            "chosen; the model or the Fisher is broken"
        )
    return change * weights / length


def newton_step(
    parameters: dict[str, torch.nn.Parameter],
    gradients: Mapping[str, torch.Tensor],
    fisher: DiagonalFisher,
    rate: float | None = None,
    acting: Acting = lambda parameters, change: (parameters, change),
) -> float:
    """theta <- theta + (alpha / N) F^-1 grad L(z_hat, theta), in place. rate: alpha / N, by default
    that of `choose_rate`, for parameters and step as they are `acting`. Returns it. Source: [AbU]
    Eq. 5."""
    directions = fisher.precondition(gradients)
    rate = choose_rate(*acting(parameters, directions)) if rate is None else rate
    for name, direction in directions.items():
        parameters[name].data.add_(direction, alpha=rate)
    return rate


def unlearn(
    gradient: QueryGradient,
    fisher: DiagonalFisher,
    rate: float | None,
    steps: int,
    draws_a_step: int,
    checkpoint: Path | None = None,
    progress: Callable[[int], object] = lambda count: None,
    on_step: Callable[[float], object] = lambda rate: None,
) -> dict[str, torch.Tensor]:
    """Unlearns one query: the weight change {name: float32 tensor on the CPU} after `steps` Newton
    steps, each along the mean of its QueryGradient over `draws_a_step` draws. rate: alpha / N, None
    where each step's is chosen; on_step is told it.

    The weights are restored exactly. Every 2,000 draws, within a step too, weights and gradients so
    far are written to the file `checkpoint`; a run that was killed goes on from there.
    """
    parameters, acting = gradient.parameters, partial(lora.acting, gradient.model.denoiser)
    originals = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    # Cut alike with checkpoints and without, so that a run that was killed sums in the same order.
    segment = max(1, CHECKPOINT_DRAWS // gradient.num_drawn) * gradient.num_drawn
    with tracked(parameters), replaced_weights(gradient.model.denoiser, originals):
        done, total, sums = torch.tensor(0), steps * draws_a_step, gradient.zeros()
        state = {
            "draws": done,
            **{f"sum {name}": value for name, value in sums.items()},  # all changed in place below
            **{f"weight {name}": parameter.data for name, parameter in parameters.items()},
        }
        if checkpoint and checkpoint.exists():
            restore(state, checkpoint, total)
        progress(int(done))
        while done < total:
            count = int(min(segment, draws_a_step - done % draws_a_step))
            gradient.add(sums, int(done), count)
            done += count
            if done % draws_a_step == 0:
                means = {name: value / draws_a_step for name, value in sums.items()}
                on_step(newton_step(parameters, means, fisher, rate, acting))
                for value in sums.values():
                    value.zero_()
            progress(count)
            is_due = done // CHECKPOINT_DRAWS > (done - count) // CHECKPOINT_DRAWS
            if checkpoint and is_due and done < total:
                write_tensor_chunk(checkpoint, state)
        return {
            name: (value.detach() - originals[name]).cpu() for name, value in parameters.items()
        }


def restore(state: Mapping[str, torch.Tensor], checkpoint: Path, total: int) -> None:
    """Brings tensors, in place, to what a checkpoint holds. Raises UserError where it is none of an
    unlearning of `total` draws."""
    found = read_tensor_chunk(checkpoint)
    shapes = {name: value.shape for name, value in state.items()}
    if {name: value.shape for name, value in found.items()} != shapes or not (
        0 <= found["draws"] <= total
    ):
        raise UserError(
            f"{checkpoint}: is not a checkpoint of this unlearning; remove it and run the same "
            f"command again"
        )
    for name, value in found.items():
        state[name].copy_(value)


def checkpoint_of(path: str | Path, identity: dict) -> Path:
    """Where the checkpoint of what becomes the weight change at `path` stands: its name holds the
    digest of what is unlearned."""
    return Path(f"{path}.{digest(identity)[:16]}.checkpoint")


def remove_checkpoints(path: str | Path) -> None:
    """Removes the checkpoints of a weight change that is complete, half-written ones too."""
    for checkpoint in Path(path).parent.glob(f"{Path(path).name}.*.checkpoint*"):
        checkpoint.unlink(missing_ok=True)  # another process may be at it too


def total_norm(tensors: Mapping[str, torch.Tensor]) -> float:
    """Norm of {name: tensor} taken as one vector."""
    return sum(float(value.detach().double().square().sum()) for value in tensors.values()) ** 0.5


def relative_change(
    change: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]
) -> float:
    """Norm of a weight change relative to the weights'."""
    squares = sum(float(delta.double().square().sum()) for delta in change.values())
    weights = sum(float(parameters[name].detach().double().square().sum()) for name in change)
    return (squares / weights) ** 0.5


def check_change(query_id: str, change: Mapping[str, torch.Tensor]) -> None:
    """Raises UserError where unlearning diverged."""
    for name, delta in change.items():
        if not torch.isfinite(delta).all():
            raise UserError(
                f"unlearning {query_id} diverged: {name} is no longer finite; try a smaller "
                f"--unlearn_lr (or {AUTO}) or a larger --damping"
            )

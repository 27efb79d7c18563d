"""What a run costs before it starts, and what of it is left while it runs."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..datasets.conditioning import TEXT
from ..models.pipelines import Model, select_parameters
from ..runtime.printing import show
from ..runtime.programs import followed_by

# A forward and backward pass to the selected weights costs about so many forward passes (emoji world,
# one CPU thread, 80 at once: 2.0; 50 gradients of single samples: 2.3).
GRADIENT = 2.1
BACKWARD = 2  # a backward pass of one sample to all weights alone
WAS_THERE = 0.02  # of what a step should take: what it takes where its files are there already
LONG_ENOUGH = 1.0  # seconds of passes that tell their pace
FISHER_SECTIONS = 32


@dataclass(frozen=True)
class Pace:
    """Seconds that one of each takes on this machine."""

    alone: float  # pass of one noisy sample through the denoiser
    forward: float  # the same, of many at once
    picture: float  # encoded by the VAE
    caption: float  # encoded by the text encoder


@dataclass(frozen=True)
class Counts:
    """What a run has to do, counted."""

    images: int
    captions: int  # of all images
    timesteps: int  # of the losses' grid
    samples: int  # of the Fisher
    draws: int  # of one picture's unlearning
    questions: int  # that have no answer yet
    sampling: int  # forward passes of making a picture, 0 where none is made
    noises: int = 0  # of removal: timesteps; 0 where a picture is unlearned
    probes: int = 0  # of removal
    texts: int = 0  # captions that are encoded: where they are stored once, the different ones
    text_bytes: int = 0  # of what is told of all captions, on the disk

    @property
    def features(self) -> int:
        """Forward passes that removal's features of one caption cost, and its loss."""
        return 1 + self.noises * (1 + BACKWARD * self.probes)

    @property
    def sweep(self) -> int:
        """Forward passes that score every image once: two views, all captions and timesteps."""
        return 2 * self.captions * self.timesteps


@dataclass(frozen=True)
class Step:
    """One part of a run."""

    name: str
    work: str  # counted, in words
    seconds: float  # about


MAKING, COMPARING = "making the picture", "comparing with plain similarity"
ENCODING = "reading pictures (latents) and captions (embeddings)"
CURVATURE = "measuring how much each weight matters (curvature)"
LOSSES = "measuring how well the model explains each image (loss)"
SCORING = "unlearning the picture and measuring again"
FEATURES = "what the model's prediction of each image hangs on (features)"
REMOVING = "removing each image from what the picture hangs on"


def time_one(run: Callable[[int], torch.Tensor], largest: int) -> tuple[float, float]:
    """Seconds of what `run(1)` does, and of one of what `run(size)` does at once, at the size that
    fills the device: the least of several, as others at work on the machine only add to it."""
    run(1).sum().item()  # the first pass is slower than all others
    size, spent, paces = 1, 0.0, []
    while True:
        start = time.perf_counter()
        run(size).sum().item()
        seconds = time.perf_counter() - start
        spent += seconds
        paces.append(seconds / size)
        if spent > LONG_ENOUGH or size >= largest:
            return paces[0], min(paces)
        size = min(largest, 4 * size)


@torch.no_grad()
def measure_pace(model: Model, resolution: int, batch_size: int) -> Pace:
    """The pace of a model on its device, from a few passes over zeros."""
    device, shapes = model.device, model.conditioning_shapes

    def predict(size):
        noisy = torch.zeros(size, *model.latent_shape(resolution), device=device)
        times = torch.zeros(size, dtype=torch.int64, device=device)
        texts = {name: torch.zeros(1, *shape, device=device) for name, shape in shapes.items()}
        return model.predict(noisy, times, texts)

    def encode(size):
        pixels = torch.zeros(size, 3, resolution, resolution, device=device)
        return model.encode_pixels(pixels)

    def read(size):
        return model.encode_prompts([""] * size)[TEXT]

    return Pace(*time_one(predict, batch_size), time_one(encode, 4)[1], time_one(read, 4)[1])


def list_steps(counts: Counts, pace: Pace, done: set[str]) -> list[Step]:
    """The steps of a run with what each costs; those that are done cost nothing."""
    ranking = list_removal(counts, pace) if counts.noises else list_unlearning(counts, pace)
    passes = {
        MAKING: (f"{counts.sampling:,} passes", counts.sampling * pace.alone),
        ENCODING: (
            f"{2 * counts.images:,} views and {counts.texts:,} captions",
            2 * counts.images * pace.picture + counts.texts * pace.caption,
        ),
        COMPARING: (f"{counts.images:,} images", 0.0),
        **ranking,
    }
    return [
        Step(name, "is there already", 0.0) if name in done else Step(name, *cost)
        for name, cost in passes.items()
        if name != MAKING or counts.sampling
    ]


def list_removal(counts: Counts, pace: Pace) -> dict[str, tuple[str, float]]:
    """{step: (work, seconds)} of removal: each image is made alone."""
    rows = counts.noises * counts.probes
    one = counts.features * pace.alone
    return {
        FEATURES: (f"{counts.captions * rows:,} backward passes", counts.captions * one),
        REMOVING: (f"{counts.questions} x {rows} backward passes", counts.questions * one),
    }


def list_unlearning(counts: Counts, pace: Pace) -> dict[str, tuple[str, float]]:
    """{step: (work, seconds)} of unlearning and exact scoring."""
    scoring = counts.questions * (GRADIENT * counts.draws + counts.sweep)
    return {
        CURVATURE: (f"{counts.samples:,} gradients", GRADIENT * counts.samples * pace.forward),
        LOSSES: (f"{counts.sweep:,} passes", counts.sweep * pace.forward),
        SCORING: (
            f"{counts.questions} x {counts.draws:,} gradients and {counts.sweep:,} passes",
            scoring * pace.forward,
        ),
    }


def count_bytes(
    counts: Counts, model: Model, resolution: int, selection: str, row_bytes: int = 0
) -> int:
    """Bytes that a run leaves or needs for a while: arrays, and the parts of the curvature, or
    features of row_bytes each."""
    channels, height, width = model.latent_shape(resolution)
    selected = select_parameters(model.denoiser, selection).values()
    weights = sum(value.numel() for value in selected)
    latents = 2 * counts.images * channels * height * width
    sections = min(FISHER_SECTIONS, -(-counts.samples // 1000))
    encoded = 4 * latents + counts.text_bytes
    if counts.noises:
        rows = counts.captions * counts.noises * counts.probes
        return encoded + rows * row_bytes + 16 * counts.questions * counts.images
    return (
        encoded
        + (4 + 8 * sections) * weights
        + counts.questions * (4 * weights + 16 * counts.images)
    )


def describe_seconds(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    if seconds < 6000:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def show_plan(steps: list[Step], num_bytes: int, needs: str) -> None:
    """Prints what a run would do. needs: what it takes besides, in words."""
    show("")
    for number, step in enumerate(steps, 1):
        cost = f"about {describe_seconds(step.seconds)}" if step.seconds else ""
        show(f"step {number} of {len(steps)}  {step.name:<56} {step.work:<38} {cost}".rstrip())
    total = sum(step.seconds for step in steps)
    show("", f"In all about {describe_seconds(total)}, and {num_bytes / 1e6:,.0f} MB on the disk.")
    show(f"Counted, not measured: {needs}.")


class Clock:
    """Says at each step of a run what is left in all; what the steps before took corrects it."""

    def __init__(self, steps: list[Step], on_step: Callable[[str], None]):
        self.steps, self.on_step = steps, on_step
        self.spent = self.expected = 0.0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One of the steps, by its name."""
        names = [step.name for step in self.steps]
        number = names.index(name)
        # Of a second and less chance tells more than the machine.
        pace = self.spent / self.expected if self.expected > 1 else 1.0
        left = [pace * step.seconds for step in self.steps[number:]]
        words = f"step {number + 1} of {len(names)}: {name}, {self.steps[number].work}"
        self.on_step(f"{words}; about {describe_seconds(sum(left))} left in all")
        start = time.monotonic()
        with followed_by(sum(left[1:])):
            yield
        took, expected = time.monotonic() - start, self.steps[number].seconds
        if took > WAS_THERE * expected:
            self.spent += took
            self.expected += expected

"""Where the parts of a pipeline are: on the device is the denoiser or, while pictures and prompts are
encoded, what encodes them, never both. The others wait in memory. On a CPU nothing moves."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class Residence:
    """Moves the parts of one pipeline. Before the first `encoding` ends, nothing is on the device."""

    def __init__(
        self, pipeline: Any, denoiser: str, encoders: Sequence[str], device: torch.device | str
    ) -> None:
        """denoiser, encoders: names of the parts."""
        self.pipeline, self.denoiser, self.encoders = pipeline, denoiser, tuple(encoders)
        self.device = torch.device(device)
        self.depth, self.is_visited = 0, False

    def place(self, names: Sequence[str], device: torch.device | str) -> None:
        """Moves parts that are there."""
        for name in names:
            if (part := getattr(self.pipeline, name, None)) is not None:
                part.to(device)

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Within it the denoiser may be away; at the end of the outermost it is on the device, and
        what encodes is not."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if not self.depth and self.device.type != "cpu":
                if self.is_visited:
                    self.place(self.encoders, "cpu")
                    self.is_visited = False
                self.place([self.denoiser], self.device)

    @contextmanager
    def visited(self) -> Iterator[None]:
        """Within it what encodes is on the device."""
        with self.encoding():
            if not self.is_visited and self.device.type != "cpu":
                self.place([self.denoiser], "cpu")
                self.place(self.encoders, self.device)
                self.is_visited = True
            yield

"""The weight change that unlearns a query, in memory or on disk."""

from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save

from ..storage.hashes import hash_bytes, hash_file
from ..storage.reading import read_tensors


class Delta:
    """A change of selected weights, {parameter name: float32 tensor on the CPU}. One on disk is read
    and hashed once, when it is first asked for."""

    def __init__(
        self, path: str | Path | None = None, tensors: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Either the path of a safetensors file, or the tensors themselves."""
        self.path = None if path is None else Path(path)
        if tensors is not None:
            self.tensors = tensors

    @property
    def file(self) -> Path:
        """The path of its file. Raises ValueError where it was given as tensors alone."""
        if self.path is None:
            raise ValueError("this weight change stands in no file")
        return self.path

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The change. Raises UserError where the file is missing or malformed."""
        return read_tensors(self.file)

    @cached_property
    def content(self) -> str:
        """Hash of the change's file, or of the file that it would be."""
        return hash_file(self.path) if self.path else hash_bytes(save(self.tensors))

    def scaled(self, factor: float) -> dict[str, torch.Tensor]:
        """The tensors times a factor."""
        return {name: tensor * factor for name, tensor in self.tensors.items()}

    def on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The tensors on a device."""
        return {name: tensor.to(device) for name, tensor in self.tensors.items()}

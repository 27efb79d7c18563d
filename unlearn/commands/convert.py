"""Makes the diffusers folder that every command loads of what people have of a model.

    python -m unlearn convert model.safetensors --base MODEL
    python -m unlearn convert flux1-dev.safetensors --base FLUX.1-dev
    python -m unlearn convert models--OWNER--NAME
    python -m unlearn convert my-customized-model --base MODEL --out converted

MODEL may be a checkpoint file of Stable Diffusion 1, 2 or SDXL (.safetensors, .ckpt), of other models
the file of the transformer alone (.safetensors or .pth, under its authors', ComfyUI's or diffusers'
names) or of all parts (Stable Diffusion 3, FLUX.1, Z-Image, Lumina2; --base lends the rest; quantized
ones are refused), a folder with weights of a variant (fp16) or as
.bin, one whose weights were saved compiled, a folder of the hub's cache, and with --base the UNet of
a training run or a customized model's folder. What can be used as it stands becomes links. Prints
the folder, for --sd_version or `pipeline` in dataset.json. `python -m unlearn attribute` does the
same by itself.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ..runtime.printing import show
from .parsing import make_parser


def parse_arguments(argv: Sequence[str] | None) -> Namespace:
    """The command line."""
    parser = make_parser(__doc__, "python -m unlearn convert")
    parser.add("model", "model", metavar="MODEL", help="a folder, or a checkpoint file")
    parser.add(
        "model", "--base", help="what a UNet's or a customized model's folder or a file lacks"
    )
    parser.add("output", "--out", default="converted", metavar="DIR", help="default converted")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Finds, makes, and prints where it is."""
    args = parse_arguments(argv)
    # Here: they import torch and diffusers, which takes seconds.
    from ..front.models import find_model
    from ..storage.artifacts import check_writable
    from .flags import check_names

    check_names(args)
    check_writable(args.out, "give another --out")
    source = find_model(args.model, args.base, Path(args.out))
    show(f"Pipeline: {source.pipeline}")
    if source.unet:
        show(f"UNet: {source.unet} (`unet` in dataset.json)")

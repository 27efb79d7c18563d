"""`python -m unlearn COMMAND`: everything beside the two scripts."""

import difflib
import importlib
import sys
from typing import NoReturn

from .errors import UserError
from .version import __version__

COMMANDS = {  # and what they do; a command is imported when it is called
    "attribute": "Answer in one command: which of these images made this picture?",
    "baselines": "Score the training images by other methods: similarity, influence, TRAK.",
    "benchmark": "Measure time, memory, FLOPs and fidelity of the ways of scoring.",
    "convert": "Make a diffusers folder of what people have of a model.",
    "doctor": "Examine this machine, a data root, its models and results.",
    "encode": "Make latents and embeddings of a data root's pictures and captions.",
    "evaluate": "Measure rankings: retrieval, retrained models, agreement.",
    "fisher": "Estimate the diagonal Fisher of a data root's model.",
    "generate": "Make pictures from prompts, with tasks that rank their training images.",
    "index": "Build an index of gradients, from which all images are ranked at once.",
    "needs": "Tell what GPU, memory and time a model takes, from its configuration.",
    "report": "Make a page of results to look at and to send on.",
    "retrain": "Train models without some images: the gold standard.",
    "tasks": "Write the task file of the AbC benchmark or of MSCOCO.",
}


def show_help() -> None:
    """Prints the commands."""
    print("usage: python -m unlearn COMMAND [--help]   (or: unlearn COMMAND)\n")
    for name, words in COMMANDS.items():
        print(f"  {name:<10} {words}")
    print("\ncompute_training_loss.py and compute_influence.py are scripts of their own.")


def call(name: str, arguments: list[str]) -> None:
    """Runs a command. Of one that imports its work where it does it, help and mistakes come before
    that."""
    command = importlib.import_module(f".commands.{name}", __package__)
    if "torch" not in sys.modules:
        try:
            command.parse_arguments(arguments)
        except UserError as error:
            end(error)
    from .runtime.programs import run

    run(command.main, arguments)


def end(error: UserError) -> NoReturn:
    """Ends the program with a user's error as one line."""
    from .runtime.printing import printable

    print(f"error: {printable(error)}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Hands the arguments to the command that the first one names."""
    from .runtime.printing import make_streams_safe

    make_streams_safe()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        show_help()
    elif name == "--version":
        print(__version__)
    elif name in COMMANDS:
        call(name, sys.argv[2:])
    else:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
        end(UserError(f"unknown command {name}; {hint}"))


if __name__ == "__main__":
    main()

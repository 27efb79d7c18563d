"""`python -m unlearn COMMAND`: everything beside the two scripts."""

import sys

from .commands import (
    baselines,
    benchmark,
    doctor,
    encode,
    evaluate,
    fisher,
    generate,
    index,
    retrain,
    tasks,
)
from .errors import UserError
from .runtime.printing import make_streams_safe
from .runtime.programs import end_with, run

COMMANDS = {
    "baselines": baselines,
    "benchmark": benchmark,
    "doctor": doctor,
    "encode": encode,
    "evaluate": evaluate,
    "fisher": fisher,
    "generate": generate,
    "index": index,
    "retrain": retrain,
    "tasks": tasks,
}


def main():
    """Hands the arguments to the command that the first one names."""
    make_streams_safe()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: python -m unlearn COMMAND [--help]\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<10} {command.__doc__.splitlines()[0]}")
    elif name in COMMANDS:
        run(COMMANDS[name].main, sys.argv[2:])
    else:
        sys.exit(
            end_with(UserError(f"unknown command {name}; expected one of {', '.join(COMMANDS)}"))
        )


if __name__ == "__main__":
    main()

"""The commands of `python -m unlearn`, one module each, with `main(argv)`."""

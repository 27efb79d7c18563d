"""What to do where a data root cannot be written: the commands that make one of one's own."""

import shlex
from collections.abc import Iterable
from pathlib import Path

from ..storage.artifacts import check_writable
from ..storage.records import record_path
from .settings import read_settings
from .texts import index_path
from .training_sets import array_paths, extra_paths, find_extras


def own_root(dataroot: str | Path) -> str:
    """Commands that make a data root of one's own of one that cannot be written. Its pictures,
    pipeline and Fisher become links; what tasks and dataset.json name is copied, because those
    paths may not lead out of a data root; latents and embeddings are left out."""
    root, settings = Path(dataroot).absolute(), read_settings(dataroot)
    linked = {
        path.absolute()
        for key in ("images", "pipeline", "unet")
        if settings[key]
        for path in (Path(dataroot) / settings[key], Path(settings[key]))
    } | set(root.glob("sd_fisher.*"))
    if (root / settings["captions"]).is_relative_to(root / settings["images"]):
        linked.discard(root / settings["images"])
    arrays = [*array_paths(dataroot), *extra_paths(dataroot, find_extras(dataroot)).values()]
    arrays.append(index_path(array_paths(dataroot)[1]))
    left_out = {path.absolute() for array in arrays for path in (array, record_path(array))}
    commands = []

    def visit(folder, own):
        found = {"ln -s": [], "cp -rL": []}
        commands.append(f"mkdir {shlex.quote(own)}")
        for path in sorted(folder.iterdir()):
            if path in linked:
                found["ln -s"].append(path)
            elif (
                any(other.is_relative_to(path) and other != path for other in linked | left_out)
                and path.is_dir()
            ):
                later.append((path, f"{own}/{path.name}"))
            elif path not in left_out and path.suffix not in (".part", ".claim"):
                found["cp -rL"].append(path)
        commands.extend(
            f"{how} {' '.join(shlex.quote(str(path)) for path in paths)} {shlex.quote(own)}/"
            for how, paths in found.items()
            if paths
        )

    later = [(root, f"{root.name}_own")]
    while later:
        visit(*later.pop(0))
    return " && ".join(commands)


def check_root_writable(dataroot: str | Path, what: str, folders: Iterable[str | Path]) -> None:
    """Raises UserError, with the commands that help, where folders of a data root, in which `what`
    is to be made, cannot be written."""
    for folder in dict.fromkeys(folders):
        check_writable(
            folder,
            f"{what} are to be made there: make a data root of your own beside it "
            f"({own_root(dataroot)}) and give that "
            "as --dataroot",
        )

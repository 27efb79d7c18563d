"""Unlearning some queries of a model into files: each query by one process, whichever comes
first."""

from pathlib import Path

import torch

from ..datasets.boxes import query_cells
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..models.pipelines import Model
from ..runtime.programs import progress
from ..storage.artifacts import write_tensors
from ..storage.records import keep_complete, name_input, read_record, record_path, write_record
from ..storage.sharing import Share
from .curvature import DiagonalFisher
from .deltas import Delta
from .draws import DRAWS
from .newton import QueryGradient, check_change, checkpoint_of, remove_checkpoints, unlearn
from .settings import AUTOCAST, UnlearnSettings
from .studies import Study

REMEDY = "give --overwrite to replace it, or another --result_dir"


def change_identity(
    model: Model, query: TrainingSet, fisher: DiagonalFisher, settings: UnlearnSettings
) -> dict:
    """Identity of the weight change that unlearns a query."""
    return {
        **model.identity,
        "query": query.identity,
        "fisher": fisher.identity,
        **settings.identity,
        **DRAWS[settings.compat].identity(model.device),
    }


def find_cells(model: Model, query: TrainingSet, settings: UnlearnSettings) -> torch.Tensor | None:
    """The cells [h, w] of a query's latent whose loss is unlearned, on the model's device, None where
    all are. Raises UserError where the box does not fit its picture."""
    cells = query_cells(settings.box, query, model.pipeline.vae_scale_factor)
    return None if cells is None else torch.from_numpy(cells).to(model.device)


def name_query(query: TrainingSet) -> None:
    """Tells records and messages which query this is."""
    name_input("query", f'{query.ids[0]} with the prompt "{query.captions[0]}"')


def unlearn_query(
    model: Model,
    query: TrainingSet,
    parameters: dict[str, torch.nn.Parameter],
    fisher: DiagonalFisher,
    settings: UnlearnSettings,
    pass_size: int,
    path: Path | None = None,
) -> Delta:
    """The weight change that unlearns a query, a TrainingSet of one image and view; written with
    its record to `path` (safetensors), where one is given, and then killed and called again it
    goes on. pass_size: draws in one pass; memory only. Raises UserError where it diverges."""
    name_query(query)
    identity = change_identity(model, query, fisher, settings)
    draws, rates = DRAWS[settings.compat].of_query(settings.seed, query, model), []
    if draws.in_order:  # the published program's batches are part of the result
        pass_size = settings.unlearn_batch_size
        if pass_size > model.num_train_timesteps:
            raise UserError(
                f"--unlearn_batch_size {pass_size}: --compat abu allows at most "
                f"{model.num_train_timesteps}"
            )
    latent, conditioning = query.query_tensors(model.device)
    gradient = QueryGradient(
        model,
        parameters,
        latent,
        conditioning,
        draws,
        pass_size,
        AUTOCAST[settings.precision],
        find_cells(model, query, settings),
    )
    total = settings.unlearn_steps * settings.draws_a_step
    with progress(total, f"unlearning {query.ids[0]}", "draws") as bar:
        change = unlearn(
            gradient,
            fisher,
            settings.rate,
            settings.unlearn_steps,
            settings.draws_a_step,
            None if path is None or draws.in_order else checkpoint_of(path, identity),
            bar.update,
            rates.append,
        )
    check_change(query.ids[0], change)
    if path is None:
        return Delta(tensors=change)
    record_path(path).unlink(missing_ok=True)
    content = write_tensors(path, change)
    write_record(path, identity, model.device, content, describe_step(rates, settings))
    return Delta(path)


def describe_step(rates: list[float], settings: UnlearnSettings) -> dict:
    """The last step, as its record tells it; alpha where N is known."""
    if not rates:
        return {}
    alpha = {"alpha": rates[-1] * settings.num_train} if settings.num_train else {}
    return {**alpha, "alpha_over_N": rates[-1]}


def read_step(path: Path, settings: UnlearnSettings) -> tuple[float, float]:
    """alpha and alpha / N of the weight change at `path`: what was asked for or, by its record,
    what was chosen."""
    alpha, asked = settings.unlearn_lr, settings.rate
    if not isinstance(alpha, str) and asked is not None:
        return alpha, asked
    remedy = "give --overwrite to make it again"
    found = read_record(path, remedy).get("circumstances")
    rate = found.get("alpha_over_N") if isinstance(found, dict) else None
    if not isinstance(rate, float):
        raise UserError(
            f"{record_path(path)}: does not say the step that was chosen (alpha_over_N); {remedy}"
        )
    return rate * settings.known_num_train, rate


def unlearn_queries(
    study: Study, queries: list[TrainingSet], names: list[str], folder: Path
) -> list[Delta]:
    """The weight changes of some queries, in `folder` under their names: those that are there are
    kept, those that other processes are at are waited for."""
    paths = [folder / name / "weight_change.safetensors" for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)

    def is_done(number):
        query = queries[number]
        name_query(query)
        identity = change_identity(study.model, query, study.fisher, study.unlearning)
        return keep_complete(paths[number], identity, study.overwrite, REMEDY)

    claims = {number: f"{name}/weight_change" for number, name in enumerate(names)}
    with Share(folder, claims, is_done) as share:
        for number in share:
            unlearn_query(
                study.model,
                queries[number],
                study.parameters,
                study.fisher,
                study.unlearning,
                study.batch_size,
                paths[number],
            )
            share.release(number)
    for path in paths:
        remove_checkpoints(path)
    return [Delta(path) for path in paths]

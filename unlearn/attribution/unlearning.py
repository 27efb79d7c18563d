"""Unlearning some queries of a model into files: each query by one process, whichever comes
first."""

from pathlib import Path

import torch

from ..datasets.settings import AUTO, AUTO_CHANGE
from ..errors import UserError
from ..runtime.programs import progress
from ..storage.artifacts import write_tensors
from ..storage.records import keep_complete, name_input, read_record, record_path, write_record
from ..storage.sharing import Share
from .losses import noise_identity
from .newton import CompatDraws, QueryDraws, check_change, remove_checkpoints, unlearn
from .scoring import AUTOCAST


def unlearning_settings(args):
    """Identity of how a query is unlearned, the same for all queries that may be compared."""
    names = (
        "weight_selection",
        "damping",
        "num_train",
        "unlearn_lr",
        "unlearn_steps",
        "unlearn_batch_size",
        "unlearn_grad_accum_steps",
        "seed",
        "precision",
        "compat",
    )
    return {
        **{name: getattr(args, name) for name in names},
        **({"target_change": AUTO_CHANGE} if args.unlearn_lr == AUTO else {}),
        **({} if args.compat else {"draws": QueryDraws.scheme}),
    }


def check_step(args):
    """Raises UserError where a step that is to be chosen is not the only one."""
    if args.unlearn_lr == AUTO and args.unlearn_steps != 1:
        raise UserError(
            f"--unlearn_lr {AUTO}: scales one Newton step, found --unlearn_steps "
            f"{args.unlearn_steps}; give --unlearn_steps 1, or "
            "a number as --unlearn_lr"
        )


def read_step(path, args):
    """alpha and alpha / N of the weight change at `path`: what was asked for or, by its record,
    what was chosen."""
    if args.unlearn_lr != AUTO:
        return args.unlearn_lr, args.unlearn_lr / args.num_train
    remedy = "give --overwrite to make it again"
    found = read_record(path, remedy).get("circumstances")
    rate = found.get("alpha_over_N") if isinstance(found, dict) else None
    if not isinstance(rate, float):
        raise UserError(
            f"{record_path(path)}: does not say the step that was chosen (alpha_over_N); {remedy}"
        )
    return rate * args.num_train, rate


def change_identity(custom, query, fisher, args):
    """Identity of the weight change that unlearns a query."""
    return {
        **custom.identity,
        "query": query.identity,
        "fisher": fisher.identity,
        **unlearning_settings(args),
        **noise_identity(args.compat, custom.device),
    }


def name_query(query):
    """Tells records and messages which query this is."""
    name_input("query", f'{query.ids[0]} with the prompt "{query.captions[0]}"')


def unlearn_query(custom, query, parameters, fisher, path, args):
    """Writes the weight change that unlearns a query to `path` (safetensors) and its record."""
    name_query(query)
    identity = change_identity(custom, query, fisher, args)
    latent, embedding = (
        torch.from_numpy(array).to(custom.device)
        for array in (query.latents[0, 0], query.embeddings[0, 0])
    )
    if args.compat and args.unlearn_batch_size > len(custom.alpha_bars):
        raise UserError(
            f"--unlearn_batch_size {args.unlearn_batch_size}: --compat abu allows at most "
            f"{len(custom.alpha_bars)}"
        )
    if args.compat:
        draws = CompatDraws(args.seed, len(custom.alpha_bars), custom.device)
    else:
        draws = QueryDraws(args.seed, query.name, query.ids[0], len(custom.alpha_bars))
    draws_a_step, rates = args.unlearn_batch_size * args.unlearn_grad_accum_steps, []
    with progress(args.unlearn_steps * draws_a_step, f"unlearning {query.ids[0]}", "draws") as bar:
        change = unlearn(
            custom,
            parameters,
            latent,
            embedding,
            draws,
            fisher,
            on_step=rates.append,
            rate=None if args.unlearn_lr == AUTO else args.unlearn_lr / args.num_train,
            steps=args.unlearn_steps,
            draws_a_step=draws_a_step,
            pass_size=args.unlearn_batch_size if args.compat else args.loss_batch_size,
            autocast=AUTOCAST[args.precision],
            checkpoint_path=None if args.compat else path,
            identity=identity,
            progress=bar.update,
        )
    check_change(query.ids[0], change)
    record_path(path).unlink(missing_ok=True)
    step = {"alpha": rates[-1] * args.num_train, "alpha_over_N": rates[-1]} if rates else {}
    write_record(path, identity, custom.device, write_tensors(path, change), step)


def unlearn_queries(custom, tasks, queries, parameters, fisher, paths, args):
    """Has the weight changes of some queries at `paths`: those that are there are kept, those that
    other processes are at are waited for."""
    folder = Path(args.result_dir) / "influence"
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)

    def is_done(number):
        name_query(queries[number])
        return keep_complete(
            paths[number],
            change_identity(custom, queries[number], fisher, args),
            args.overwrite,
            "give --overwrite to replace it, or another --result_dir",
        )

    with Share(
        folder,
        {number: f"{task.result_name}/weight_change" for number, task in enumerate(tasks)},
        is_done,
    ) as share:
        for number in share:
            unlearn_query(custom, queries[number], parameters, fisher, paths[number], args)
            share.release(number)
    for path in paths:
        remove_checkpoints(path)

"""What several queries share of a pass, and feed-forward layers in blocks: the same results, and
less work."""

import copy
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers.models.attention import FeedForward

import compute_influence
import compute_training_loss
from unlearn import UserError, running
from unlearn.attribution import draws, sweeps
from unlearn.attribution.caches import cache_columns
from unlearn.attribution.losses import changed_losses, loss_sums
from unlearn.attribution.sweeps import Sweep
from unlearn.models import passes
from unlearn.models.passes import BlockedFeedForward, sharing_prefix
from unlearn.models.pipelines import changed_weights, select_parameters
from unlearn.storage.hashes import digest, hash_file
from unlearn.storage.leases import create_claim
from unlearn.storage.sharing import parts_folder

GRID = [0, 250, 500, 750]


@pytest.fixture(scope="module")
def changes(model):
    """Three weight changes of K and V."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            name: 0.1 * value.std() * torch.randn(value.shape, generator=generator)
            for name, value in select_parameters(model.denoiser, "cross-attn-kv").items()
        }
        for _ in range(3)
    ]


@pytest.mark.parametrize("batch_size", [3, 40])
def test_queries_scored_together_get_each_ones_losses_to_the_bit(
    model, training_set, changes, tmp_path, batch_size
):
    images = training_set.first(12)
    with changed_losses(model, changes) as measure_of:
        together = Sweep(images, GRID, batch_size).run(model, tmp_path, "", measure_of(range(3)))
    for number, change in enumerate(changes):
        (tmp_path / str(number)).mkdir()
        with changed_weights(model.denoiser, change):
            alone = Sweep(images, GRID, batch_size).run(
                model, tmp_path / str(number), "", loss_sums
            )
        np.testing.assert_array_equal(together[:, number], alone)
    assert len(np.unique(together, axis=1)) == len(together), "changes changed nothing"


@contextmanager
def counted(modules):
    """Yields how often each of some modules, {name: module}, is run."""
    counts = dict.fromkeys(modules, 0)
    hooks = [
        module.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
        for name, module in modules.items()
    ]
    yield counts
    for hook in hooks:
        hook.remove()


def test_what_precedes_the_first_cross_attention_runs_once_for_all_queries(
    model, training_set, changes, tmp_path
):
    block = model.denoiser.down_blocks[0]
    inside = {
        "resnet": block.resnets[0].conv1,
        "self-attention": block.attentions[0].transformer_blocks[0].attn1.to_q,
        "cross-attention": block.attentions[0].transformer_blocks[0].attn2.to_q,
    }
    before = {name: module.forward for name, module in model.denoiser.named_modules()}
    with counted(inside) as counts, changed_losses(model, changes) as measure_of:
        Sweep(training_set.first(2), GRID, 16).run(model, tmp_path, "", measure_of([2, 0, 1]))
    assert counts == {"resnet": 1, "self-attention": 1, "cross-attention": 3}
    assert before == {name: module.forward for name, module in model.denoiser.named_modules()}, (
        "the denoiser is not as it was"
    )
    assert len(model.family.before_text(model.denoiser)) == 3


def test_nothing_is_remembered_outside_of_one_measure(model, training_set, tmp_path):
    block = model.denoiser.down_blocks[0]
    modules = model.family.before_text(model.denoiser)
    with counted({"resnet": block.resnets[0].conv1}) as counts, sharing_prefix(modules):
        for number in range(2):
            Sweep(training_set.take([number]), GRID, 16).run(
                model, folder_of(tmp_path, number), "", loss_sums
            )
    assert counts == {"resnet": 2}


def folder_of(path, number):
    """A new folder."""
    folder = path / str(number)
    folder.mkdir()
    return folder


def test_a_feed_forward_layer_in_blocks_gives_what_diffusers_does(monkeypatch):
    torch.manual_seed(0)
    stock = FeedForward(16, activation_fn="geglu")
    hidden = torch.randn(7, 5, 16, requires_grad=True)
    blocked = copy.deepcopy(stock)
    passes.replace_feed_forward(torch.nn.ModuleList([blocked]))
    assert type(blocked) is BlockedFeedForward
    monkeypatch.setattr(passes, "BLOCK_ROWS", 11)  # blocks of 2, 2, 2 and 1 samples
    expected, found = stock(hidden), blocked(hidden)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    gradients = [
        torch.autograd.grad(value.square().sum(), hidden)[0] for value in (expected, found)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    with counted({"inner": blocked.net[0]}) as counts:
        blocked(hidden)
    assert counts == {"inner": 4}


@pytest.fixture
def queries(model, training_set, changes, tmp_path, monkeypatch):
    """(paths, cache) of the losses under three changes, where cache(number, later) makes one file,
    and chunks of those later: three."""
    monkeypatch.setattr(draws.chunk_rows, "__defaults__", (20,))
    paths = [folder_of(tmp_path, number) / "laion_loss.npy" for number in range(3)]

    def cache(number, later=()):
        with changed_losses(model, changes) as measure_of:
            return cache_columns(
                Sweep(training_set, [500], 64),
                model,
                [paths[number]],
                [{"query": number}],
                measure_of([number]),
                later=[(paths[other], {"query": other}) for other in later],
                measure_with=lambda numbers: measure_of(
                    [number, *(later[place] for place in numbers)]
                ),
            )[0]

    return paths, cache


@contextmanager
def counted_chunks(monkeypatch):
    """Yields a list that grows by one with every chunk that is computed."""
    chunks, score_rows = [], sweeps.score_rows
    with monkeypatch.context() as patch:
        patch.setattr(
            sweeps, "score_rows", lambda *given: (chunks.append(1), score_rows(*given))[1]
        )
        yield chunks


def test_a_query_whose_chunks_came_along_with_anothers_costs_no_pass_and_differs_in_no_bit(
    queries, monkeypatch
):
    paths, cache = queries
    alone = [cache(number) for number in range(3)]
    for path in paths:
        path.unlink()
    with counted_chunks(monkeypatch) as chunks:
        np.testing.assert_array_equal(cache(0, [1, 2]), alone[0])
        assert len(chunks) == 3
        for number in 1, 2:
            np.testing.assert_array_equal(cache(number), alone[number])
        assert len(chunks) == 3
    assert not list(paths[0].parent.parent.rglob(".*")), "chunks were left"


def test_what_came_along_before_a_kill_is_kept_for_any_other_company(queries, monkeypatch):
    paths, cache = queries
    write, written = sweeps.write_array_chunk, []

    def killed(path, values):
        if (
            len(written) == 4
        ):  # a chunk of each of three queries, and one of the first query's second
            raise KeyboardInterrupt
        written.append(path)
        write(path, values)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sweeps, "write_array_chunk", killed)
        cache(0, [1, 2])
    with counted_chunks(monkeypatch) as chunks:
        cache(2, [1])
        assert len(chunks) == 2
        cache(0)
        assert len(chunks) == 3
        cache(1)
        assert len(chunks) == 3
    assert not list(paths[0].parent.parent.rglob(".*")), "chunks were left"


def test_nothing_comes_along_for_what_is_complete_or_is_not_ours(queries):
    paths, cache = queries
    cache(1)
    paths[2].write_bytes(b"another program's")
    kept = paths[1].stat().st_mtime_ns
    cache(0, [1, 2])
    assert paths[1].stat().st_mtime_ns == kept and not list(paths[0].parent.parent.rglob(".*"))
    with pytest.raises(UserError, match="has no record"):
        cache(2)
    assert paths[2].read_bytes() == b"another program's"


def test_what_another_process_is_at_does_not_come_along(queries, monkeypatch):
    paths, cache = queries
    folder = parts_folder(paths[1], digest([{"query": 1}]))
    folder.mkdir()
    claim = folder / "000000-of-000003.claim"
    assert create_claim(claim)  # this process is alive, and holds it
    cache(0, [1])
    assert sorted(path.name for path in folder.iterdir()) == [
        claim.name,
        "000001-of-000003.npy",
        "000002-of-000003.npy",
    ]
    claim.unlink()
    with counted_chunks(monkeypatch) as chunks:
        cache(1)
    assert len(chunks) == 1


def test_exact_scores_of_two_queries_together_are_those_of_each_alone(flags, tmp_path, monkeypatch):
    more = [
        "--laion_subset_size",
        "20",
        "--loss_time_samples",
        "2",
        "--unlearn_steps",
        "1",
        "--unlearn_grad_accum_steps",
        "1",
        "--damping",
        "0.1",
        "--num_train",
        "60",
        "--unlearn_lr",
        "0.00001",
    ]
    compute_training_loss.main([*flags, "--laion_subset_size", "20", "--time_samples", "2"])
    found = []
    for together in 1, 5:
        monkeypatch.setattr(running, "TOGETHER", together)
        shutil.rmtree(tmp_path / "results/influence", ignore_errors=True)
        compute_influence.main([*flags, *more])
        found.append(
            {
                path.relative_to(tmp_path).as_posix(): hash_file(path)
                for path in (tmp_path / "results/influence").rglob("*_loss.npy")
            }
        )
    assert found[0] == found[1] and len(found[0]) == 4

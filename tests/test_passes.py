"""What several queries share of a pass, and feed-forward layers in blocks: the same results, and less work."""

import copy
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers.models.attention import FeedForward

import compute_influence
import compute_training_loss
from unlearn import passes, scoring, sweeps
from unlearn.hashes import hash_file
from unlearn.losses import changed_losses, loss_sums
from unlearn.models import changed_weights, select_parameters
from unlearn.passes import BlockedFeedForward, modules_before_text, sharing_prefix
from unlearn.sweeps import Sweep, cache_columns, chunk_folder, columns_left

GRID = [0, 250, 500, 750]


@pytest.fixture(scope="module")
def changes(model):
    """Three weight changes of K and V."""
    generator = torch.Generator().manual_seed(0)
    return [{name: 0.1 * value.std() * torch.randn(value.shape, generator=generator)
             for name, value in select_parameters(model.denoiser, "cross-attn-kv").items()} for _ in range(3)]


@pytest.mark.parametrize("batch_size", [3, 40])
def test_queries_scored_together_get_each_ones_losses_to_the_bit(model, training_set, changes, tmp_path, batch_size):
    images = training_set.first(12)
    with changed_losses(model.denoiser, changes) as measure:
        together = Sweep(images, GRID, batch_size).run(model, tmp_path, "", measure)
    for number, change in enumerate(changes):
        (tmp_path / str(number)).mkdir()
        with changed_weights(model.denoiser, change):
            alone = Sweep(images, GRID, batch_size).run(model, tmp_path / str(number), "", loss_sums)
        np.testing.assert_array_equal(together[:, number], alone)
    assert len(np.unique(together, axis=1)) == len(together), "changes changed nothing"


@contextmanager
def counted(modules):
    """Yields how often each of some modules, {name: module}, is run."""
    counts = dict.fromkeys(modules, 0)
    hooks = [module.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1})) for name, module in modules.items()]
    yield counts
    for hook in hooks:
        hook.remove()


def test_what_precedes_the_first_cross_attention_runs_once_for_all_queries(model, training_set, changes, tmp_path):
    block = model.denoiser.down_blocks[0]
    inside = {"resnet": block.resnets[0].conv1, "self-attention": block.attentions[0].transformer_blocks[0].attn1.to_q,
              "cross-attention": block.attentions[0].transformer_blocks[0].attn2.to_q}
    before = {name: module.forward for name, module in model.denoiser.named_modules()}
    with counted(inside) as counts, changed_losses(model.denoiser, changes) as measure:
        Sweep(training_set.first(2), GRID, 16).run(model, tmp_path, "", measure)
    assert counts == {"resnet": 1, "self-attention": 1, "cross-attention": 3}
    assert before == {name: module.forward for name, module in model.denoiser.named_modules()}, "the denoiser is not as it was"
    assert len(list(modules_before_text(model.denoiser))) == 3


def test_nothing_is_remembered_outside_of_one_measure(model, training_set, tmp_path):
    block = model.denoiser.down_blocks[0]
    with counted({"resnet": block.resnets[0].conv1}) as counts, sharing_prefix(model.denoiser):
        for number in range(2):
            Sweep(training_set.take([number]), GRID, 16).run(model, folder_of(tmp_path, number), "", loss_sums)
    assert counts == {"resnet": 2}


def folder_of(path, number):
    """A new folder."""
    folder = path / str(number)
    folder.mkdir()
    return folder


def test_a_feed_forward_layer_in_blocks_gives_what_diffusers_does(monkeypatch):
    torch.manual_seed(0)
    stock, hidden = FeedForward(16, activation_fn="geglu"), torch.randn(7, 5, 16, requires_grad=True)
    blocked = copy.deepcopy(stock)
    passes.replace_feed_forward(torch.nn.ModuleList([blocked]))
    assert type(blocked) is BlockedFeedForward
    monkeypatch.setattr(passes, "BLOCK_ROWS", 11)  # blocks of 2, 2, 2 and 1 samples
    expected, found = stock(hidden), blocked(hidden)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(value.square().sum(), hidden)[0] for value in (expected, found)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    with counted({"inner": blocked.net[0]}) as counts:
        blocked(hidden)
    assert counts == {"inner": 4}


@pytest.fixture
def columns(model, training_set, changes, tmp_path):
    """Sweeps of the losses of three queries into files: (paths, identities, cache), where cache(numbers) makes some of them."""
    paths = [folder_of(tmp_path, number) / "laion_loss.npy" for number in range(3)]
    identities = [{"query": number} for number in range(3)]

    def cache(numbers):
        with changed_losses(model.denoiser, [changes[number] for number in numbers]) as measure:
            return cache_columns(Sweep(training_set.first(40), [500], 64), model, [paths[number] for number in numbers],
                                 [identities[number] for number in numbers], measure)

    return paths, identities, cache


def test_queries_that_were_scored_before_are_not_scored_again(columns):
    paths, identities, cache = columns
    cache([1])
    assert columns_left(paths, identities) == [0, 2]
    cache([0, 2])
    assert columns_left(paths, identities) == [0, 1, 2], "all are complete: nothing is left, and all are read"


@pytest.mark.parametrize("together", [[0, 1, 2], [1, 2]])
def test_queries_begun_together_are_finished_together_after_a_kill_between_their_files(columns, together, monkeypatch):
    paths, identities, cache = columns
    others = [number for number in range(3) if number not in together]
    if others:
        cache(others)
    write_record, written = sweeps.write_record, []

    def killed(path, *given):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        return write_record(path, *given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sweeps, "write_record", killed)
        cache(together)
    left = columns_left(paths, identities)
    assert left == together and chunk_folder([paths[number] for number in left], [identities[number] for number in left]).is_dir()
    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "score_rows", lambda *given: pytest.fail("a chunk was computed again"))
        cache(left)
    assert not list(paths[0].parent.parent.rglob(".*")), "chunks were left"


def test_exact_scores_of_two_queries_together_are_those_of_each_alone(flags, tmp_path, monkeypatch):
    more = ["--laion_subset_size", "20", "--loss_time_samples", "2", "--unlearn_steps", "1", "--unlearn_grad_accum_steps", "1", "--damping", "0.1",
            "--num_train", "60", "--unlearn_lr", "0.00001"]
    compute_training_loss.main([*flags, "--laion_subset_size", "20", "--time_samples", "2"])
    found = []
    for together in 1, 5:
        monkeypatch.setattr(scoring, "TOGETHER", together)
        shutil.rmtree(tmp_path / "results/influence", ignore_errors=True)
        compute_influence.main([*flags, *more])
        found.append({path.relative_to(tmp_path).as_posix(): hash_file(path) for path in (tmp_path / "results/influence").rglob("*_loss.npy")})
    assert found[0] == found[1] and len(found[0]) == 4

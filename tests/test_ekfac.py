"""EK-FAC: the inverse is that of the dense matrix, the estimate what its definition says, and
unlearning takes it as it takes the diagonal."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PARITY

import unlearn
import unlearn.attribution.fishers
import unlearn.storage.artifacts
from unlearn import UserError
from unlearn.attribution import estimation
from unlearn.attribution.curvature import per_sample_gradients
from unlearn.attribution.ekfac import EkFac, find_bases, key
from unlearn.attribution.estimation import FisherSettings, draw_samples, estimate_fisher
from unlearn.attribution.fishers import open_fisher
from unlearn.attribution.index import check_diagonal
from unlearn.commands import fisher as command
from unlearn.models.pipelines import select_parameters, tracked
from unlearn.storage.reading import read_tensors

KV = "cross-attn-kv"
SETTINGS = FisherSettings(num_samples=6, curvature="ek-fac")
GENERATOR = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def dense(outputs, inputs, eigenvalues):
    """The curvature of vec(W) written out: (Q_G x Q_A) diag(Lambda) (Q_G x Q_A)^T, float64."""
    basis = torch.kron(outputs.double(), inputs.double())
    return basis @ torch.diag(eigenvalues.double().flatten()) @ basis.T


@pytest.mark.parametrize("is_shared", [False, True])
def test_it_divides_by_the_dense_kronecker_matrix(is_shared):
    outputs, inputs = (
        find_bases({"a": part @ part.T})["a"] for part in (random(3, 9), random(4, 9))
    )
    eigenvalues, gradient = random(3, 4).square(), random(3, 4)
    tensors = {
        key("outputs", "l.weight"): outputs,
        key("inputs", "" if is_shared else "l.weight"): inputs,
        key("eigenvalues", "l.weight"): eigenvalues,
    }
    found = EkFac(tensors, damping=0.1).precondition({"l.weight": gradient})["l.weight"]
    curvature = dense(outputs, inputs, eigenvalues + 0.1 * eigenvalues.mean())
    expected = torch.linalg.solve(curvature, gradient.flatten()).reshape(3, 4)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


def test_where_the_curvature_is_a_kronecker_product_it_is_that_curvature():
    """Gradients g a^T of independent g and a: E[vec vec^T] = G x A, which it then has exactly."""
    left, right = random(3, 3), random(4, 4)
    outputs, inputs = left @ left.T, right @ right.T
    bases = find_bases({"outputs": outputs, "inputs": inputs})
    spread = [torch.linalg.eigvalsh(each) for each in (outputs, inputs)]
    eigenvalues = torch.outer(*spread)
    found = dense(bases["outputs"], bases["inputs"], eigenvalues)
    torch.testing.assert_close(found, torch.kron(outputs, inputs), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def made(model, training_set, tmp_path_factory):
    """EK-FAC of K and V from a few samples: its file."""
    path = tmp_path_factory.mktemp("ekfac") / "ekfac.safetensors"
    estimate_fisher(model, training_set.first(8), SETTINGS, path, batch_size=4)
    for parameter in model.denoiser.parameters():
        parameter.requires_grad_(False)
    return path


def test_the_estimate_is_what_its_definition_says(model, training_set, made):
    found, parameters = read_tensors(made), select_parameters(model.denoiser, KV)
    images = training_set.first(8)
    texts = draw_samples(images, range(6), model.num_train_timesteps, 0)[3]["embeddings"].double()
    rows = texts.flatten(0, 1)
    covariance = rows.T @ rows
    rotated = found["inputs"].double().T @ covariance @ found["inputs"].double()
    off_diagonal = rotated - torch.diag(rotated.diagonal())
    assert off_diagonal.abs().max() < 1e-4 * rotated.diagonal().max()
    later = draw_samples(images, range(6, 12), model.num_train_timesteps, 0)
    with tracked(parameters):
        gradients = {name: g.double() for name, g in per_sample_gradients(model, parameters, later)}
    for name, own in gradients.items():
        outputs, inputs = found[key("outputs", name)].double(), found["inputs"].double()
        expected = (outputs.T @ own @ inputs).square().mean(dim=0)
        torch.testing.assert_close(
            found[key("eigenvalues", name)].double(),
            expected,
            rtol=1e-3,
            atol=1e-5 * float(expected.max()),
        )
        identity = outputs.T @ outputs
        torch.testing.assert_close(identity, torch.eye(len(outputs)).double(), atol=1e-5, rtol=0)
    assert sum(name.startswith("inputs") for name in found) == 1, "all layers read one text"
    assert len(found) == 1 + 2 * len(parameters)


def test_it_does_not_depend_on_the_batch_and_goes_on_where_it_was_killed(
    model, training_set, made, tmp_path, monkeypatch
):
    path, write, calls = tmp_path / "again.safetensors", estimation.write_tensor_chunk, []
    run = partial(estimate_fisher, model, training_set.first(8), SETTINGS, path)

    def stop(*given):
        calls.append(given)
        if len(calls) == 4:  # of the second pass
            raise KeyboardInterrupt
        write(*given)

    with monkeypatch.context() as patch:
        patch.setattr(estimation, "write_tensor_chunk", stop)
        with pytest.raises(KeyboardInterrupt):
            run(batch_size=4)
    assert not path.exists()
    run(batch_size=4)
    assert path.read_bytes() == made.read_bytes() and not list(tmp_path.glob(".*"))
    other = tmp_path / "other.safetensors"
    estimate_fisher(model, training_set.first(8), SETTINGS, other, batch_size=1)
    parameters = select_parameters(model.denoiser, KV)
    gradients = {name: torch.ones_like(value) for name, value in parameters.items()}
    first, second = (
        open_fisher(each, model, parameters, 0.1, "").precondition(gradients)
        for each in (made, other)
    )
    for name, direction in first.items():
        torch.testing.assert_close(
            second[name], direction, rtol=1e-2, atol=1e-3 * float(direction.abs().max())
        )
    for parameter in model.denoiser.parameters():
        parameter.requires_grad_(False)


def test_a_query_is_unlearned_along_it(model, training_set, made):
    query = training_set.take([9])
    fisher = unlearn.load_fisher(made, model)
    assert isinstance(fisher, EkFac)
    delta = unlearn.unlearn(model, query, fisher, draws=4)
    weights = select_parameters(model.denoiser, KV)
    moved = sum(float(change.square().sum()) for change in delta.tensors.values())
    total = sum(float(weights[name].square().sum()) for name in delta.tensors)
    assert (moved / total) ** 0.5 == pytest.approx(0.04, rel=1e-3)
    images = training_set.first(2)
    assert (unlearn.compute_output_changes(model, images, delta, time_samples=2) > 0).all()


def test_what_it_cannot_do_is_refused(model, training_set, made, tmp_path):
    settings = FisherSettings(6, "all", curvature="ek-fac")
    with pytest.raises(UserError, match="is no weight of a linear layer; give --weight_selection"):
        estimate_fisher(model, training_set, settings, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="--index: weighs gradients by the diagonal Fisher"):
        check_diagonal(unlearn.load_fisher(made, model))
    path = tmp_path / "part.safetensors"
    shutil.copy(made.with_suffix(".json"), path.with_suffix(".json"))
    tensors = read_tensors(made)
    unlearn.storage.artifacts.write_tensors(
        path, {name: value for name, value in tensors.items() if name != "inputs"}
    )
    with pytest.raises(UserError, match="content is not what its record says|lacks the basis"):
        unlearn.load_fisher(path, model)
    wrong = {**tensors, "inputs": tensors["inputs"][:2]}
    for broken, said in ((wrong, "expected finite numbers"), ({}, "lacks")):
        with pytest.raises(UserError, match=said):
            estimation.check_ekfac(
                path, broken, select_parameters(model.denoiser, KV), 0.1, "make it again"
            )


def test_the_command_makes_it_beside_the_diagonal_and_says_what_it_is(root, monkeypatch, model):
    monkeypatch.setattr(command, "load_model", lambda *given, **more: model)
    settings = {"name": "mine", "pipeline": str(PARITY / "fixture/sd-tiny")}
    (root / "dataset.json").write_text(json.dumps(settings))
    flags = ["--dataroot", str(root), "--num_samples", "4", "--device", "cpu"]
    command.main([*flags, "--curvature", "ek-fac", "--laion_subset_size", "8"])
    record = json.loads((root / "sd_ekfac.json").read_text())
    assert record["identity"]["curvature"] == "ek-fac"
    assert Path(unlearn.attribution.fishers.find_fisher(root, None, "")).name.startswith(
        "sd_fisher"
    )
    assert np.isfinite(read_tensors(root / "sd_ekfac.safetensors")["inputs"].numpy()).all()
    for parameter in model.denoiser.parameters():
        parameter.requires_grad_(False)

"""What must hold on a CUDA device. Run with  bash tests/run.sh -m gpu  on a machine that has one."""

import numpy as np
import pytest
import torch

import compute_influence
import compute_training_loss
from unlearn.influence import rank_images

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
UNLEARNING = ["--unlearn_lr", "100", "--unlearn_steps", "2", "--unlearn_grad_accum_steps", "8"]


def attribute(flags, results, device):
    """Both scripts on one device: losses before unlearning and the first query's influence."""
    flags = [*flags, "--result_dir", str(results / device), "--device", device]
    compute_training_loss.main(flags)
    compute_influence.main([*flags, *UNLEARNING])
    with np.load(results / device / "influence/tiny/gpt/blob/samples/00000/influence.npz") as file:
        return np.load(results / device / "orig_loss/tiny/blob/laion_loss.npy"), file["influence"]


def test_losses_and_rankings_on_cuda_are_those_of_the_cpu(flags, tmp_path):
    (cpu_losses, cpu_influence), (cuda_losses, cuda_influence) = (attribute(flags, tmp_path, device) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(cuda_losses, cpu_losses, rtol=1e-6)
    ranks = [np.argsort(rank_images(influence)) for influence in (cpu_influence, cuda_influence)]
    assert np.corrcoef(*ranks)[0, 1] > 0.9999  # Spearman


def test_two_runs_on_cuda_give_the_same_bits(flags, tmp_path):
    (first_losses, first), (second_losses, second) = (attribute(flags, tmp_path / name, "cuda") for name in ("first", "second"))
    np.testing.assert_array_equal(first_losses, second_losses)
    np.testing.assert_array_equal(first, second)


def test_a_batch_too_large_for_the_device_names_the_flag(flags, monkeypatch):
    def predict(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    from unlearn.models import Model
    from unlearn.runtime import run
    monkeypatch.setattr(Model, "predict", predict)
    with pytest.raises(SystemExit) as end:
        run(compute_training_loss.main, [*flags, "--device", "cuda"])
    assert end.value.code == 2

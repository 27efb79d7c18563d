"""Losses of images under a model, on a fixed grid of timesteps with noise that belongs to the image."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from . import UserError, noise
from .artifacts import check_record, is_complete, keep_complete, read_array, record_path, write_array, write_record
from .datasets import check_pixels
from .hashes import digest
from .runtime import is_out_of_memory, log, progress, run_ahead

CHUNK_IMAGES = 32  # part of no result: any chunking gives the same losses


def sample_losses(model, latents, noise, timesteps, embeddings, keys_values=None):
    """|| prediction - target ||^2 of each sample, mean over pixels: [batch] float64, on the model's device.

    latents, noise: [batch, C, h, w]; timesteps: [batch] int64; embeddings: [texts, tokens, features], each the text of
    batch / texts successive samples; keys_values: theirs, where they are known. Source: [AbU] section 4.
    """
    error = model.predict(model.diffuse(latents, noise, timesteps), timesteps, embeddings, keys_values) - model.target(latents, noise, timesteps)
    return error.double().square().mean(dim=tuple(range(1, error.ndim)))


def noise_identity(compat, device):
    """Identity of a noise scheme: what decides which numbers a seed stands for."""
    if compat:
        return {"noise": f"torch generator, {compat}", "noise_device": device.type}
    return {"noise": noise.SCHEME, "known_answer": noise.known_answer()}


def loss_identity(model, training_set, grid, noise_seed, precision, compat=None, batch_size=None):
    """Identity of losses: what must be the same for two of them to be compared."""
    scheme = {"batch_size": batch_size} if compat else {"noise_seed": noise_seed}
    return {**model.identity, "dataset": training_set.name, "num_images": len(training_set), "training_set": training_set.identity,
            **noise_identity(compat, model.device), **scheme, "timesteps": grid, "precision": precision}


def chunk_rows(num_images, num_views, chunk_images=CHUNK_IMAGES):
    """Rows (view * num_images + image) of each chunk: fixed ranges of images, every view of them."""
    for start in range(0, num_images, chunk_images):
        images = np.arange(start, min(start + chunk_images, num_images))
        yield np.concatenate([view * num_images + images for view in range(num_views)])


def chunk_noise(training_set, rows, grid, noise_seed, pool):
    """Noise [rows, captions * timesteps, C, h, w] float32 of a chunk, drawn image by image in worker threads."""
    num_captions, shape = training_set.embeddings.shape[1], training_set.latents.shape[2:]

    def draw(row):
        view, image = divmod(int(row), len(training_set))
        slots = [(view, caption, timestep, 0) for caption in range(num_captions) for timestep in grid]
        return noise.image_noise(noise_seed, training_set.name, training_set.ids[image], slots, shape)

    return np.stack(list(pool.map(draw, rows)))


def loss_sums(model, latents, noise, timesteps, embeddings):
    """Sum of the losses of each text's samples: [texts] float64. Inputs as in `sample_losses`."""
    with torch.no_grad():
        return sample_losses(model, latents, noise, timesteps, embeddings).reshape(len(embeddings), -1).sum(dim=1)


def score_rows(model, training_set, rows, grid, noises, batch_size, measure=loss_sums):
    """Losses [rows] float64, each the mean over captions and grid; `batch_size` samples go through the model at once.

    noises: [rows, captions * timesteps, C, h, w] in the order caption, timestep. measure: what is averaged, from a model and
    samples (`sample_losses`) to its sum over the samples of each text, [texts, ...]; the result is then [rows, ...].
    """
    views, images = np.divmod(rows, len(training_set))
    latents, embeddings = training_set.latents[views, images], training_set.embeddings[images]
    check_pixels(f"latents of {training_set.ids[images[0]]} to {training_set.ids[images[-1]]}", latents)
    check_pixels(f"embeddings of {training_set.ids[images[0]]} to {training_set.ids[images[-1]]}", embeddings)
    num_captions, shape, sums = embeddings.shape[1], latents.shape[1:], []
    latents, embeddings, noises = (torch.from_numpy(np.asarray(array, np.float32)) for array in (latents, embeddings, noises))
    latents, embeddings = latents.repeat_interleave(num_captions, dim=0), embeddings.flatten(0, 1)
    noises, timesteps = noises.reshape(len(latents), len(grid), *shape), torch.tensor(grid)
    # A batch is a block of texts x timesteps, so that a text's keys and values are made once.
    num_blocks = -(-len(latents) // max(1, batch_size // len(grid)))
    for texts in torch.arange(len(latents)).tensor_split(num_blocks):
        partial = 0
        for slots in torch.arange(len(grid)).split(batch_size):
            latent, normals, embedding = (tensor.to(model.device, non_blocking=True)
                                          for tensor in (latents[texts], noises[texts][:, slots], embeddings[texts]))
            times = timesteps[slots].to(model.device).repeat(len(texts))
            partial = partial + measure(model, latent.repeat_interleave(len(slots), dim=0), normals.flatten(0, 1), times, embedding)
        sums.append(partial.cpu())
    sums = torch.cat(sums)
    return (sums.reshape(len(rows), num_captions, *sums.shape[1:]).sum(dim=1) / (num_captions * len(grid))).numpy()


def split_rows(rows, size):
    """Rows in runs of `size`, the last one shorter."""
    return np.split(rows, np.arange(size, len(rows), size))


class Sweep:
    """The losses of a whole training set, cut into chunks that are kept until the last is done.

    Native chunks are fixed ranges of images. With `compat` they are runs of ten of the published program's batches:
    rows in the order as is, then mirrored, `batch_size // len(grid)` of them a batch, noise seeded by the batch's index.
    """

    def __init__(self, training_set, grid, batch_size, noise_seed=0, compat=None):
        self.training_set, self.grid, self.batch_size, self.noise_seed, self.compat = training_set, grid, batch_size, noise_seed, compat
        self.pass_size = batch_size  # samples in one pass: memory only
        num_rows = training_set.latents.shape[0] * len(training_set)
        if compat:
            if batch_size < len(grid):
                raise UserError(f"--batch_size {batch_size}: --compat abu needs at least the {len(grid)} timesteps of an image")
            self.rows_a_batch = batch_size // len(grid)
            self.chunks = split_rows(np.arange(num_rows), 10 * self.rows_a_batch)
        else:
            self.chunks = list(chunk_rows(len(training_set), training_set.latents.shape[0]))

    def draw(self, rows, device, pool):
        """The noise of one chunk."""
        if not self.compat:
            return chunk_noise(self.training_set, rows, self.grid, self.noise_seed, pool)
        batches, shape = split_rows(rows, self.rows_a_batch), self.training_set.latents.shape[2:]
        return np.concatenate([
            noise.batch_noise(int(batch[0]) // self.rows_a_batch, (len(batch) * len(self.grid), *shape), device)
            .cpu().numpy().reshape(len(batch), len(self.grid), *shape) for batch in batches])

    def batches(self):
        """Rows of each of the published program's batches (`compat` only)."""
        return split_rows(np.concatenate(self.chunks), self.rows_a_batch)

    def score(self, model, rows, noises, measure):
        """`score_rows` of a chunk; where the device's memory is full, in ever smaller passes from there on."""
        while True:
            try:
                return score_rows(model, self.training_set, rows, self.grid, noises, self.pass_size, measure)
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.pass_size == 1:
                    raise
            self.pass_size //= 2
            torch.cuda.empty_cache()
            log.warning(f"out of memory: going on with {self.pass_size} samples in one pass")

    def run(self, model, folder, description, measure=loss_sums):
        """Losses [views * N] float32: all images as is, then all mirrored; or of another `measure` (see `score_rows`)
        [views * N, ...]. Chunks found in `folder`, which belongs to this very sweep, are not scored again."""
        num_rows, samples_a_row = sum(map(len, self.chunks)), len(self.grid) * self.training_set.embeddings.shape[1]
        paths = [folder / f"{number:06d}.npy" for number in range(len(self.chunks))]
        pending = [number for number, path in enumerate(paths) if not path.exists()]
        done = num_rows - sum(len(self.chunks[number]) for number in pending)
        with progress(num_rows * samples_a_row, description, "samples", done * samples_a_row) as bar, ThreadPoolExecutor(4) as pool:
            def draw(number):
                return self.draw(self.chunks[number], model.device, pool)

            def score(number, noises):
                write_array(paths[number], self.score(model, self.chunks[number], noises, measure))
                bar.update(len(self.chunks[number]) * samples_a_row)

            run_ahead(pending, draw, score, model.device)
        chunks = [read_array(path, "chunk", mmap=False) for path in paths]
        values = np.empty((num_rows, *chunks[0].shape[1:]), np.float32)
        for rows, chunk in zip(self.chunks, chunks):
            values[rows] = chunk
        return values


def remove_chunks(path):
    """Removes the chunks of finished losses, those of other settings too."""
    for folder in path.parent.glob(f".{path.stem}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def cache_losses(sweep, model, path, identity, overwrite=False):
    """Runs a sweep into `path` (.npy float32 [views * N]) and its record, or keeps what is there under the same identity.
    Chunks stand beside it, in a folder that the identity names, until all are done. Raises UserError where the file was
    made with other settings and may not be overwritten."""
    path = Path(path)
    folder = path.parent / f".{path.stem}-{digest(identity)[:16]}"
    # Losses without a record that stand alone are not ours; beside this sweep's own chunks they are, killed before the record.
    if path.exists() and not is_complete(path) and not folder.is_dir() and not overwrite:
        check_record(path, identity, "give --overwrite to replace it, or another --result_dir")
    if keep_complete(path, identity, overwrite, "give --overwrite to replace it, or another --result_dir"):
        remove_chunks(path)
        return read_array(path, "losses", mmap=False)
    losses = sweep.run(model, folder, f"{path.parent.name}/{path.stem}")
    if not np.isfinite(losses).all():
        raise UserError(f"{path}: {int((~np.isfinite(losses)).sum())} losses are NaN or infinite; the weights have diverged "
                        "(try a smaller --unlearn_lr or a larger --damping)")
    record_path(path).unlink(missing_ok=True)
    write_array(path, losses)
    write_record(path, identity, model.device)
    remove_chunks(path)
    return losses


def adopt_losses(sweep, model, path, identity):
    """Gives a loss cache of the published program, which has no record, its record, after its first and last batch were
    scored again and agreed to 1e-4. Raises UserError where they do not."""
    losses, batches = read_array(path, "losses", mmap=False), sweep.batches()
    num_rows = sum(map(len, batches))
    if losses.shape != (num_rows,):
        raise UserError(f"{path}: expected {num_rows} losses (two views of each image), found {list(losses.shape)}")
    for rows in (batches[0], batches[-1]):
        with ThreadPoolExecutor(1) as pool:
            again = score_rows(model, sweep.training_set, rows, sweep.grid, sweep.draw(rows, model.device, pool), sweep.pass_size)
        worst = float(np.max(np.abs(again / losses[rows] - 1)))
        if not worst <= 1e-4:
            raise UserError(f"{path}: has no record, and its rows {rows[0]} to {rows[-1]} scored again differ by {worst:.1e} relative "
                            "(at most 1e-4 allowed): made with other settings or, of exemplars, from latents drawn at random; delete it and "
                            "run compute_training_loss.py --compat abu")
    write_record(path, identity, model.device)

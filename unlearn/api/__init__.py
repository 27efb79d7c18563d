"""The Python interface: what the scripts do, step by step, for notebooks and other programs. One
call does it all, and keeps it in a folder:

    import unlearn
    [answer] = unlearn.attribute("picture.png", model="MODEL", images="FOLDER", prompt="red apple")
    answer.show(); answer.table(); answer.scores; answer.warnings; answer.save("elsewhere")

Step by step:

    import unlearn
    model = unlearn.load_model("data/emoji/pipeline")
    images = unlearn.open_training_set("data/emoji", model)
    fisher = unlearn.load_fisher("data/emoji/sd_fisher.safetensors", model)
    query = unlearn.encode_query(model, "picture.png", prompt="red apple")
    before = unlearn.compute_losses(model, images)
    delta = unlearn.unlearn(model, query, fisher, lr=1e-3, num_train=1448)
    after = unlearn.compute_losses(model, images, delta=delta)
    ranking = unlearn.rank(images, after - before)

Or by how far the model's predictions of the images move, without losses before:

    ranking = unlearn.rank(images, unlearn.compute_output_changes(model, images, delta))

Or by removal, without a Fisher and a step; features that are kept serve every query:

    scores = unlearn.removal_scores(model, images, query, cache="features")
    ranking = unlearn.rank(images, scores)
    together = unlearn.removal_group_scores(model, images, query, {"a": [0, 7]}, cache="features")
    chosen = unlearn.choose_set(model, images, query, 10, cache="features")

Functions raise UserError and never end the program. What is not given is the data root's, else what
suits one's own data; see the table of settings in unlearn/README.md.
"""

from ..attribution.curvature import DiagonalFisher
from ..attribution.deltas import Delta
from ..attribution.removal import RemovalSettings
from ..attribution.removal_sets import ChosenSet
from ..datasets.training_sets import TrainingSet
from ..models.customization import customized
from ..models.pipelines import Model
from ..report.ranking import Ranking, rank
from .opening import encode_query, load_fisher, load_model, open_training_set
from .removal import choose_set, removal_group_scores, removal_scores
from .unlearning import compute_losses, compute_output_changes, unlearn

__all__ = [
    "ChosenSet",
    "Delta",
    "DiagonalFisher",
    "Model",
    "Ranking",
    "RemovalSettings",
    "TrainingSet",
    "choose_set",
    "compute_losses",
    "compute_output_changes",
    "customized",
    "encode_query",
    "load_fisher",
    "load_model",
    "open_training_set",
    "rank",
    "removal_group_scores",
    "removal_scores",
    "unlearn",
]

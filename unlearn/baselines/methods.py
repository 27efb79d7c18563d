"""The baselines by name. Each is a dataclass whose fields are flags of `python -m unlearn
baselines`."""

from .gradient_methods import DTrak, Influence, JourneyTrak, Trak
from .mucs import Mucs
from .normalised_methods import Das, DTrakNormalised
from .patches import Nda
from .similarity_methods import Pixel, Random, Similarity, Text, Vae, Words

METHODS = {
    "random": Random,
    "pixel": Pixel,
    "vae": Vae,
    "words": Words,
    "text": Text,
    "similarity": Similarity,
    "influence": Influence,
    "trak": Trak,
    "journeytrak": JourneyTrak,
    "dtrak": DTrak,
    "dtrak-normalised": DTrakNormalised,
    "das": Das,
    "nda": Nda,
    "mucs": Mucs,
}
COSTLY = ("mucs",)  # which train for each query: they are scored where they are asked for

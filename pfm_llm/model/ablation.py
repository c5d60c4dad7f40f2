"""What a run does without, to measure what it is worth: the values of the setting ``ablation``.

Each is trained like the run that it is compared with, on the same data, head and rates.

==================  ===========================================================================
ablation            difference
==================  ===========================================================================
``no_pass``         user states are zero: no layer reads a history. LoRA, ``head.state_proj`` and
                    ``head.item_ids_in`` have no effect, and are neither trained nor sent.
``shuffled_texts``  the texts are permuted among the items: what a text says has no meaning.
``random_weights``  a language model of the same shape with random weights.
==================  ===========================================================================
"""

import numpy as np

from pfm_llm.base.seeding import numpy_generator
from pfm_llm.config.choices import Ablation
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.data.interactions import Catalogue

_OF_THE_PASS = ("lora.", "head.state_proj", "head.item_ids_in")


def has_pass(config: ExperimentConfig) -> bool:
    """Whether the language model reads histories."""
    return config.ablation is not Ablation.NO_PASS


def is_trained(config: ExperimentConfig, name: str) -> bool:
    """Whether a shared tensor has an effect, so that it is to be trained and sent."""
    return has_pass(config) or not name.startswith(_OF_THE_PASS)


def texts_of(config: ExperimentConfig, catalogue: Catalogue) -> Catalogue:
    """The catalogue whose texts are read; its ids stay in their order."""
    if config.ablation is not Ablation.SHUFFLED_TEXTS:
        return catalogue
    order = numpy_generator(config.seed, "ablation/texts").permutation(len(catalogue))
    return Catalogue(catalogue.item_ids, catalogue.take(np.asarray(order)).fields)

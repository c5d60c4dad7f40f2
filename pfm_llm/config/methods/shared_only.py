"""FedIT (Zhang et al. 2023, arXiv 2305.05644): one shared LoRA, its factors averaged.

::

    h = (W + s B A) x,    A <- mean_u A_u,    B <- mean_u B_u        (section 3.2)

The mean of the factors is not the factor of the mean product; `aggregation_error` measures by
how much. In the regime ``fedsgd`` every client takes one gradient at the same point, and the
server steps on their mean: there the question does not arise.
"""

from pfm_llm.config.methods.spec import MethodSpec

SPEC = MethodSpec(settings={"adapters.private.enabled": False})

"""FFA-LoRA (Sun et al. 2024, ICLR, arXiv 2403.12313): A stays as it was drawn, B is averaged.

::

    h = (W + s B A_0) x,    B <- mean_u B_u        (equation 6)

Since mean_u(B_u) A_0 = mean_u(B_u A_0), averaging is exact, and half of the adapter is never
sent. The recommender head is shared and trained as in every other method.
"""

from pfm_llm.config.methods.spec import MethodSpec

SPEC = MethodSpec(settings={"adapters.private.enabled": False}, frozen=("lora.*.A",))

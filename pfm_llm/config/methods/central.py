"""Pooled training: the reference that sees all data at once.

A step is a stochastic gradient over windows of users drawn at random from the pool::

    h = (W + s B A) x,    (A, B, head) <- Adam(mean over the windows of the gradient)

In this system: a round is a step, its cohort is the minibatch, and each of its users gives one
window drawn at random (`windows_per_step: 1`), weighted by its number of targets. The users are
drawn evenly, not in proportion to their histories.
"""

from pfm_llm.config.methods.spec import MethodSpec

SPEC = MethodSpec(
    settings={
        "adapters.private.enabled": False,
        "federation.local.windows_per_step": 1,
        "federation.server.weighting": "num_examples",
    }
)

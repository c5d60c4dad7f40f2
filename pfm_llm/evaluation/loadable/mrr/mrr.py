"""MRR for ``evaluate.load``; see `list_metrics`."""

from pfm_llm.evaluation import list_metrics


# evaluate takes the first metric class in a script, so the base class has no name of its own here.
class Mrr(list_metrics.ListMetric):
    """MRR of ranked lists; see `list_metrics.ListMetric`."""

    metric = "mrr"

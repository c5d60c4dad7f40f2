"""No method of the comparison: the settings alone say what is trained. It fixes nothing."""

from pfm_llm.config.methods.spec import MethodSpec

SPEC = MethodSpec(settings={})

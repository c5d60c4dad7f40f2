"""What a finished run says about personality, measured on test."""

from pfm_llm.study.run import study_run

__all__ = ["study_run"]

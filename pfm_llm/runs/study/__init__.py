"""What a finished run says about personality, measured on test."""

from pfm_llm.runs.study.run import study_run

__all__ = ["study_run"]

"""What a finished run says about personality, measured on test."""

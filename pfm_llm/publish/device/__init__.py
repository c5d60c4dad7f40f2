"""LoRA folders of PEFT for programs that know nothing of us: one LoRA of two, and GGUF."""

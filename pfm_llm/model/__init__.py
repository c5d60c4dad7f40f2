"""The trained thing: frozen backbone, LoRA, head, objective, and the many-clients pass."""

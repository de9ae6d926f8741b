"""Training: fine-tune a model while a protection keeps the alignment that the model already has."""

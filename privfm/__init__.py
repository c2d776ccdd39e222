"""privfm: what federated fine-tuning of foundation models leaks, what breaks it, and what each protection costs."""

__version__ = "0.1.0"

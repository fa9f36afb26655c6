"""Export Hugging Face decoders to static-shape graphs around a fixed-size KV cache."""

__version__ = "0.1.0"

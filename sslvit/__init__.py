"""Self-supervised pretraining of Vision Transformers. Importing this loads no torchvision, no datasets, no timm."""

__version__ = "0.1.0"

"""The worth of frozen and fine-tuned backbones. Protocols are pure functions of Features: tensors in, numbers out."""

"""What a frozen or fine-tuned backbone is worth. Protocols are pure functions of Features: tensors in, numbers out."""

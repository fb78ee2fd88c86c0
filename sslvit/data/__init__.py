"""Images in, batches of views out. Nothing here knows a model."""

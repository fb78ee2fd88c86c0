"""One readable file per objective; none imports another."""

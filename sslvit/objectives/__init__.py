"""One readable file an objective; none imports another."""

"""One small file per family of metrics, pure functions over arrays."""

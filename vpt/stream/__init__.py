"""Tasks that come one after another: data, strategies, stages on disk, metrics."""

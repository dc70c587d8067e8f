"""How a model is converted: one hub, its rewrites, one exporter a format, the artifact and the cache."""

"""Front ends: each turns a model into the same dense graph, the normal form (see `build`)."""

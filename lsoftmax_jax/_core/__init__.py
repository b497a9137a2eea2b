"""How the losses are computed: private, read from `spec` to `run`."""

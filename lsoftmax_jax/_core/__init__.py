"""How the losses are computed. Private; read spec, mesh, tiles, target, blocks, run."""

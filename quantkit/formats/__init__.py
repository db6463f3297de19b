"""How artifacts lie on disk: one format a file, each packs and unpacks.."""

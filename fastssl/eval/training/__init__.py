"""Parts that the protocols which train share."""

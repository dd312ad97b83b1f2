"""KL-16, the variational autoencoder of MAR and the families after it (arXiv 2112.10752, 2406.11838)."""

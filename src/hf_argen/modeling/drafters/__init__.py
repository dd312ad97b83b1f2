"""Networks that draft for a language model: Medusa's heads and EAGLE."""

"""Data on its way to a network: dataset layouts, splits, the tables between stages, nucleus patches."""

"""Hard negative mining in a weakly labelled pool of patches."""

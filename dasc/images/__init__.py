"""Images of tissue: open any file, by region where it is large; its resolution, stain and tissue."""

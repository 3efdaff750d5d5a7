"""From an image to detections: candidate nuclei, one field, one slide tile by tile, resuming."""

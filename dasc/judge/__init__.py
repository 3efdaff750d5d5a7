"""Numbers that judge detections: matching, F1, thresholds, calibration, hotspot. Nothing here reads an image."""

"""Reads pairs of images and captions and makes training batches of them. Nothing here uses a device."""

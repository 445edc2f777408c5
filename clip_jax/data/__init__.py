"""From files to batches of pairs, without touching a device."""

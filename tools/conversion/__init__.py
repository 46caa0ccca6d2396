"""From one form on disk to another (formats/, families/), what changes on the way, and the proof of it."""
